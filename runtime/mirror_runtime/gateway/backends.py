"""The backends of a gateway: an encoder in this process, or a Triton server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mirror_runtime.async_encoder import CONCURRENT_BATCHES, AsyncEncoder
from mirror_runtime.bulk_room import SLICE_TOKENS
from mirror_runtime.bundle import Pooling, VectorType
from mirror_runtime.client.async_client import AsyncClient
from mirror_runtime.client.client import connect
from mirror_runtime.client.exchange import BATCH_TOKENS, Served
from mirror_runtime.client.protocol import ClientOptions, read_facts
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import InputError, MirrorError, ServerError, UnavailableError
from mirror_runtime.packing import TOKEN_BUDGET
from mirror_runtime.selection import AUTO
from mirror_runtime.tokenizer import Item, LongTexts
from mirror_runtime.twins import Speed
from mirror_runtime.vector_cache import CachedVectors

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The model that a backend serves."""

    model: str  # name of the encoder's base model
    fingerprint: str
    dim: int  # components of a vector
    max_tokens: int  # longest text, special tokens included
    normalized: bool  # whether vectors have length 1
    long_texts: LongTexts  # the policy for longer texts
    engine: str
    precision: str
    backend: str  # "in-process", or the server's address
    prompts: Mapping[str, str] | None = None  # by name; None if they are unknown, as behind Triton
    scores_pairs: bool = False  # a reranker: it takes pairs of a query and a text, and `dim` is 1
    per_token: bool = False  # each token has a vector, and the text has none
    template: str | None = None  # text that the encoder itself puts around every text
    dimensions: tuple[int, ...] = ()  # shorter vectors that it was trained for, as far as it records them

    @property
    def most_tokens(self) -> int | None:
        """Return the most tokens that are computed of one text; None where longer ones are split."""
        return None if self.long_texts.splits else self.max_tokens


class EncodingBackend(Protocol):
    """Encodes texts of many concurrent callers with the model that `card` describes.

    `tokens_at_once` keep it busy: more would wait in a queue of its own, where nobody can pass them. `slice_tokens` are
    worth a call: while small requests come, they wait for one slice of a large one.
    """

    card: ModelCard
    tokens_at_once: int
    slice_tokens: int

    @property
    def cached(self) -> CachedVectors | None:
        """Its part of a vector cache. `encode` does not ask it: what it has need not wait for a turn."""

    async def encode(self, texts: Sequence[Item]) -> Served:
        """Encode texts, or pairs of one query; `errors` has the bad ones. Cancelling drops those not yet started."""

    async def aclose(self) -> None:
        """Finish accepted texts and release everything."""


class InProcessBackend:
    """An encoder in this process, of which at most `max_waiting` texts wait. `aclose` closes the encoder too."""

    slice_tokens = SLICE_TOKENS  # those that come together are computed together

    def __init__(self, encoder: Encoder, *, long_texts: str, max_waiting: int) -> None:
        spec = encoder.spec
        _check_vector_type(spec.vector_type)
        self._encoder = encoder
        self.cached = encoder.cached
        self._async = AsyncEncoder(encoder, max_waiting=max_waiting)
        self.tokens_at_once = (CONCURRENT_BATCHES + 1) * TOKEN_BUDGET * encoder.engine.streams
        self.card = ModelCard(
            model=spec.base_model,
            fingerprint=encoder.fingerprint,
            dim=spec.dim,
            max_tokens=spec.max_tokens,
            normalized=spec.normalize,
            long_texts=LongTexts(long_texts),
            engine=encoder.engine.name.value,
            precision=encoder.engine.precision.value,
            backend="in-process",
            prompts=encoder.prompts,
            template=spec.template,
            dimensions=spec.trained_dims,
            scores_pairs=spec.scores_pairs,
            per_token=spec.per_token,
        )

    async def encode(self, texts: Sequence[Item]) -> Served:
        """Encode texts, see `EncodingBackend.encode`."""
        return Served(**vars(await self._async.compute(texts)), fingerprint=self.card.fingerprint)

    async def aclose(self) -> None:
        """Finish accepted texts and close the encoder."""
        await self._async.aclose()
        self._encoder.close()


def backends_of(encoder: Encoder, *, long_texts: str, max_waiting: int) -> list[InProcessBackend]:
    """Return the backend of an encoder, followed by that of its static twin if its bundle has one; see the class."""
    encoders = [encoder, encoder.at(Speed.FAST)] if encoder.has_twin else [encoder]
    return [InProcessBackend(one, long_texts=long_texts, max_waiting=max_waiting) for one in encoders]


class TritonBackend:
    """A model on a Triton server. A replaced model is noticed at its first answer."""

    cached = None
    tokens_at_once = 4 * BATCH_TOKENS  # requests of one call that the client has under way
    slice_tokens = 1024  # a millisecond's work for the gateway

    def __init__(self, options: ClientOptions, card: ModelCard) -> None:
        self.card = card
        self._options = options
        self._client = AsyncClient(
            options.url, protocol=options.protocol, model=options.model, timeout_s=options.timeout_s, patient=False
        )

    async def encode(self, texts: Sequence[Item]) -> Served:
        """Encode texts, see `EncodingBackend.encode`."""
        query = texts[0][0] if texts and self.card.scores_pairs else None
        served = await self._client.encode_detailed(
            [text if isinstance(text, str) else text[1] for text in texts], query=query
        )
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
    _check_vector_type(facts.vector_type)
    parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    try:
        return ModelCard(
            model=parameters["base_model"],
            fingerprint=parameters["fingerprint"],
            dim=facts.width,
            max_tokens=int(parameters["max_tokens"]),
            normalized=parameters["normalize"] == "true",
            scores_pairs=parameters.get("pooling") == Pooling.RERANK.value,
            long_texts=LongTexts(parameters["long_texts"]),
            engine=parameters["engine"],
            precision=parameters["precision"],
            backend=f"triton {options.protocol}://{options.address}",
            dimensions=_dimensions(parameters.get("dimensions", AUTO)),
        )
    except KeyError as error:
        raise ServerError(
            f"the configuration of model {options.model!r} at {options.address} has no {error.args[0]}: "
            "write its repository again with export/to_triton.py"
        ) from error
    except ValueError as error:
        raise ServerError(
            f"the configuration of model {options.model!r} at {options.address} is of another version ({error}): "
            "write its repository again with export/to_triton.py"
        ) from error


def _dimensions(stated: str) -> tuple[int, ...]:
    return () if stated == AUTO else tuple(map(int, stated.split(",")))


def _check_vector_type(vector_type: VectorType) -> None:
    """Check that vectors are floats, the only numbers in OpenAI's and TEI's responses."""
    if vector_type not in (VectorType.FLOAT32, VectorType.FLOAT16):
        raise InputError(
            f"this encoder gives {vector_type.value} vectors, which OpenAI's and TEI's responses cannot hold: serve it "
            "with mirror serve, or export it with float vectors"
        )
