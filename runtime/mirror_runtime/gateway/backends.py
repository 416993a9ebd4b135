"""Who computes: an encoder in this process, or a Triton server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mirror_runtime.async_encoder import AsyncEncoder
from mirror_runtime.bundle import VectorType
from mirror_runtime.client.exchange import Served
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import InputError

PROBE = "Is anybody there?"
"""The text of an inference that is made to see whether inferences succeed."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a backend serves.

    Attributes:
        model: what the encoder was made from.
        fingerprint: of the vector space.
        dim: components of a vector.
        max_tokens: longest text, special tokens included.
        normalized: whether vectors have length 1.
        long_texts: what happens to longer texts: "truncate", "error" or "chunk".
        engine: what runs it.
        precision: what it runs in.
        backend: "in-process", or where the server is.
    """

    model: str
    fingerprint: str
    dim: int
    max_tokens: int
    normalized: bool
    long_texts: str
    engine: str
    precision: str
    backend: str


class Backend(Protocol):
    """Turns texts into vectors for many callers at once.

    Attributes:
        card: what is served.
    """

    card: ModelCard

    async def encode(self, texts: Sequence[str]) -> Served:
        """Encode texts; bad ones are named in the result's `errors`. Cancelling drops what has not started.

        Raises:
            MirrorError: it cannot be done, see `mirror_runtime.errors`.
        """

    async def aclose(self) -> None:
        """Finish what was taken and release everything."""


class InProcess:
    """An encoder of this process, which this closes at the end.

    Args:
        encoder: what computes.
        long_texts: the policy that it was loaded with.
        max_waiting: texts that may wait.

    Raises:
        InputError: its vectors are no floats, which is all that the gateway's answers can hold.
    """

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
        """See `Backend.encode`."""
        found = await self._async.encode_detailed(texts)
        return Served(
            vectors=found.vectors,
            tokens=found.tokens,
            truncated=found.truncated,
            errors=found.errors,
            fingerprint=self.card.fingerprint,
        )

    async def aclose(self) -> None:
        """See `Backend.aclose`."""
        await self._async.aclose()
        self._encoder.close()


def check_vector_type(kind: VectorType) -> None:
    """See that vectors are floats.

    Raises:
        InputError: they are not.
    """
    if kind not in (VectorType.FLOAT32, VectorType.FLOAT16):
        raise InputError(
            f"this encoder gives {kind.value} vectors, which OpenAI's and TEI's answers cannot hold: serve it with "
            "mirror serve, or export it with float vectors"
        )
