"""What an encoder returns for a sequence of texts, and what it holds while their batches run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.errors import InputError, TextError
from mirror_runtime.packing import PackedBatch
from mirror_runtime.tokenizer import Tokenized
from mirror_runtime.vectors import Vectors, dtype_of, width_of


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result for a sequence of texts.

    Attributes:
        vectors: [n, width] of the encoder's vector type (by default float32 [n, dim], see `mirror_runtime.vectors`),
            in the texts' order; zeros for a failed text. With pooling `tokens` [sum of `counts`, width].
        tokens: int64 [n], tokens of the whole text with special tokens, before truncation; 0 for a failed text.
        truncated: bool [n], whether tokens were cut off.
        errors: the failed texts, by position; the other texts are encoded.
        counts: int64 [n], vectors of each text with pooling `tokens`, 0 for a failed one; None where each has one.
    """

    vectors: Vectors
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    errors: Mapping[int, TextError]
    counts: NDArray[np.int64] | None = None

    @classmethod
    def empty(cls, spec: EncoderSpec) -> Encoded:
        """Return the result of no texts."""
        none = np.zeros(0, np.int64)
        return cls(
            vectors=np.zeros((0, width_of(spec)), dtype_of(spec)),
            tokens=none,
            truncated=none.astype(np.bool_),
            errors={},
            counts=none if spec.per_token else None,
        )

    def by_text(self) -> Sequence[Vectors] | Vectors:
        """Return each text's vector [width], or with pooling `tokens` each text's vectors [tokens, width]."""
        if self.counts is None:
            return self.vectors
        return np.split(self.vectors, np.cumsum(self.counts)[:-1])[: self.counts.size]

    def vectors_or_raise(self) -> Vectors:
        """Return the vectors.

        Raises:
            TextError: for the first text that has none.
        """
        if self.errors:
            raise self.errors[min(self.errors)]
        return self.vectors


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Join the results of texts that follow one another: at least one part, which is returned itself if it is alone."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)]).tolist()
    return Encoded(
        vectors=np.concatenate([part.vectors for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
        errors={
            at + i: type(error)(at + i, error.reason)
            for at, part in zip(starts, parts, strict=False)
            for i, error in part.errors.items()
        },
        counts=None if parts[0].counts is None else np.concatenate([part.counts for part in parts]),
    )


def check_text_vectors(spec: EncoderSpec) -> None:
    """Raise an `InputError` for an encoder whose texts have no single vector."""
    if spec.per_token:
        raise InputError(
            "this encoder has a vector for each token and none for a text: use Encoder.encode_tokens, or mirror "
            "gateway and POST /embed_all"
        )


@dataclass(frozen=True)
class PendingWindow:
    """Texts whose batches are queued, running or done: returned by `Encoder.begin`, taken by `Encoder.finish`."""

    tokenized: Tokenized
    batches: Sequence[PackedBatch]
    outputs: Sequence[Future[Vectors]]
