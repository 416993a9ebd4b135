"""A Triton server behind the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mirror_runtime.client.async_client import AsyncClient
from mirror_runtime.client.client import connect
from mirror_runtime.client.exchange import Served
from mirror_runtime.client.protocol import MODEL_NAME, ClientOptions, read_facts
from mirror_runtime.errors import MirrorError, ServerError, UnavailableError
from mirror_runtime.gateway.backends import ModelCard, check_vector_type

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a model is served.

    Attributes:
        url: host and port.
        protocol: "grpc" or "http".
        model: the model's name there.
    """

    url: str
    protocol: str = "grpc"
    model: str = MODEL_NAME


class TritonBackend:
    """A model of a Triton server. A model that is replaced there is noticed with its first answer.

    Args:
        address: where it is.
        card: what it serves now.
        timeout_s: how long a request may take.
    """

    def __init__(self, address: Address, card: ModelCard, *, timeout_s: float) -> None:
        self.card = card
        self._address = address
        self._timeout_s = timeout_s
        self._client = AsyncClient(
            address.url, protocol=address.protocol, model=address.model, timeout_s=timeout_s, patient=False
        )

    async def encode(self, texts: Sequence[str]) -> Served:
        """See `Backend.encode`."""
        served = await self._client.encode_detailed(texts)
        if served.fingerprint not in (None, self.card.fingerprint):
            with contextlib.suppress(MirrorError):  # this answer is good, and the next one will ask again
                self.card = await asyncio.to_thread(fetch_card, self._address, self._timeout_s)
        return served

    async def aclose(self) -> None:
        """See `Backend.aclose`."""
        await self._client.close()


def fetch_card(address: Address, timeout_s: float, *, wait_s: float = 0.0) -> ModelCard:
    """Ask a server what it serves. Blocks.

    Args:
        address: where it is.
        timeout_s: how long it may take to answer.
        wait_s: how long to try again while nobody answers there.

    Raises:
        UnavailableError: nobody answers.
        MissingExtra: tritonclient is not installed.
        ServerError: it serves none of our models.
        InputError: the address is none, or the model's vectors are no floats.
    """
    transport = connect(
        ClientOptions(url=address.url, protocol=address.protocol, model=address.model, timeout_s=timeout_s)
    )
    give_up_at = time.monotonic() + wait_s
    try:
        while True:
            try:
                return _card(transport.config(), address)
            except UnavailableError:
                if time.monotonic() >= give_up_at:
                    raise
                time.sleep(_POLL_S)
    finally:
        transport.close()


def _card(config: Mapping[str, Any], address: Address) -> ModelCard:
    """Read a card from a model's configuration, where `render_config` wrote it."""
    facts = read_facts(config)
    check_vector_type(facts.vector_type)
    said = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    try:
        return ModelCard(
            model=said["base_model"],
            fingerprint=said["fingerprint"],
            dim=facts.width,
            max_tokens=int(said["max_tokens"]),
            normalized=said["normalize"] == "true",
            long_texts=said["long_texts"],
            engine=said["engine"],
            precision=said["precision"],
            backend=f"triton {address.protocol}://{address.url}",
        )
    except KeyError as error:
        raise ServerError(
            f"model {address.model!r} at {address.url} does not say its {error.args[0]}: "
            "write its repository again with export/to_triton.py"
        ) from error
