"""A Triton server behind the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mirror_runtime.client.async_client import AsyncClient
from mirror_runtime.client.client import connect
from mirror_runtime.client.exchange import Served
from mirror_runtime.client.protocol import ClientOptions, read_facts
from mirror_runtime.errors import MirrorError, ServerError, UnavailableError
from mirror_runtime.gateway.backends import ModelCard, check_vector_type

_POLL_S = 0.5


class TritonBackend:
    """A model on a Triton server. A replaced model is noticed at its first answer."""

    def __init__(self, options: ClientOptions, card: ModelCard) -> None:
        self.card = card
        self._options = options
        self._client = AsyncClient(
            options.url, protocol=options.protocol, model=options.model, timeout_s=options.timeout_s, patient=False
        )

    async def encode(self, texts: Sequence[str]) -> Served:
        """Encode texts, see `EncodingBackend.encode`."""
        served = await self._client.encode_detailed(texts)
        if served.fingerprint not in (None, self.card.fingerprint):
            with contextlib.suppress(MirrorError):  # this answer is valid, and the next one fetches the card again
                self.card = await asyncio.to_thread(fetch_card, self._options)
        return served

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.close()


def fetch_card(options: ClientOptions, *, wait_s: float = 0.0) -> ModelCard:
    """Fetch the card of a served model, and retry for `wait_s` while the server cannot be reached. Blocks."""
    transport = connect(options)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                return _card(transport.config(), options)
            except UnavailableError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_POLL_S)
    finally:
        transport.close()


def _card(config: Mapping[str, Any], options: ClientOptions) -> ModelCard:
    """Read a card from a model's configuration, as `render_config` wrote it."""
    facts = read_facts(config)
    check_vector_type(facts.vector_type)
    parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    try:
        return ModelCard(
            model=parameters["base_model"],
            fingerprint=parameters["fingerprint"],
            dim=facts.width,
            max_tokens=int(parameters["max_tokens"]),
            normalized=parameters["normalize"] == "true",
            long_texts=parameters["long_texts"],
            engine=parameters["engine"],
            precision=parameters["precision"],
            backend=f"triton {options.protocol}://{options.address}",
        )
    except KeyError as error:
        raise ServerError(
            f"the configuration of model {options.model!r} at {options.address} has no {error.args[0]}: "
            "write its repository again with export/to_triton.py"
        ) from error
