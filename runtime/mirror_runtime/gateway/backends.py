"""The backends of a gateway: an encoder in this process here, a Triton server in `triton_backend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mirror_runtime.async_encoder import AsyncEncoder
from mirror_runtime.bundle import VectorType
from mirror_runtime.client.exchange import Served
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The model that a backend serves."""

    model: str  # name of the encoder's base model
    fingerprint: str
    dim: int  # components of a vector
    max_tokens: int  # longest text, special tokens included
    normalized: bool  # whether vectors have length 1
    long_texts: str  # the policy for longer texts: "truncate", "error" or "chunk"
    engine: str
    precision: str
    backend: str  # "in-process", or the server's address


class EncodingBackend(Protocol):
    """Encodes texts of many concurrent callers with the model that `card` describes."""

    card: ModelCard

    async def encode(self, texts: Sequence[str]) -> Served:
        """Encode texts. The result's `errors` name the bad ones. Cancelling drops texts that have not started."""

    async def aclose(self) -> None:
        """Finish accepted texts and release everything."""


class InProcessBackend:
    """An encoder in this process, of which at most `max_waiting` texts wait. `aclose` closes the encoder too."""

    def __init__(self, encoder: Encoder, *, long_texts: str, max_waiting: int) -> None:
        spec = encoder.spec
        check_vector_type(spec.vector_type)
        self._encoder = encoder
        self._async = AsyncEncoder(encoder, max_waiting=max_waiting)
        self.card = ModelCard(
            model=spec.base_model,
            fingerprint=encoder.fingerprint,
            dim=spec.dim,
            max_tokens=spec.max_tokens,
            normalized=spec.normalize,
            long_texts=long_texts,
            engine=encoder.engine.name.value,
            precision=encoder.engine.precision.value,
            backend="in-process",
        )

    async def encode(self, texts: Sequence[str]) -> Served:
        """Encode texts, see `EncodingBackend.encode`."""
        found = await self._async.encode_detailed(texts)
        return Served(
            vectors=found.vectors,
            tokens=found.tokens,
            truncated=found.truncated,
            errors=found.errors,
            fingerprint=self.card.fingerprint,
        )

    async def aclose(self) -> None:
        """Finish accepted texts and close the encoder."""
        await self._async.aclose()
        self._encoder.close()


def check_vector_type(vector_type: VectorType) -> None:
    """Check that vectors are floats, the only numbers in OpenAI's and TEI's responses."""
    if vector_type not in (VectorType.FLOAT32, VectorType.FLOAT16):
        raise InputError(
            f"this encoder gives {vector_type.value} vectors, which OpenAI's and TEI's responses cannot hold: serve it "
            "with mirror serve, or export it with float vectors"
        )
