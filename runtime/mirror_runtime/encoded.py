"""What an encoder returns for a sequence of texts, and what it holds while their batches run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.errors import TextError
from mirror_runtime.packing import PackedBatch
from mirror_runtime.tokenizer import Tokenized
from mirror_runtime.vectors import Vectors


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result for a sequence of texts.

    Attributes:
        vectors: [n, width] of the encoder's vector type (by default float32 [n, dim], see `mirror_runtime.vectors`),
            in the texts' order; zeros for a failed text.
        tokens: int64 [n], tokens of the whole text with special tokens, before truncation; 0 for a failed text.
        truncated: bool [n], whether tokens were cut off.
        errors: the failed texts, by position; the other texts are encoded.
    """

    vectors: Vectors
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    errors: Mapping[int, TextError]

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
    )


@dataclass(frozen=True)
class PendingWindow:
    """Texts whose batches are queued, running or done: returned by `Encoder.begin`, taken by `Encoder.finish`."""

    tokenized: Tokenized
    batches: Sequence[PackedBatch]
    outputs: Sequence[Future[Vectors]]
