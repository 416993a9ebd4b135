"""Score texts against a query with a reranker's bundle: the packed engine of `Encoder`, fed with pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.tokenizer import iterate


@dataclass(frozen=True)
class Ranked:
    """A text's position in the caller's list, and its score."""

    index: int
    score: float


class Reranker:
    """Scores texts against a query. Safe to use from several threads; close it, or use it in a `with` block.

    Attributes:
        encoder: takes pairs in place of texts: `encode([(query, text), …])` returns raw scores float32 [n, 1], and
            `encode_detailed` an error for each bad pair beside the scores of the others.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @classmethod
    def load(cls, bundle: str | Path, **options: Any) -> Reranker:
        """Load a bundle that was exported from a cross-encoder; the options and exceptions are those of `Encoder.load`.

        Raises:
            BundleError: also where the bundle is an encoder's.
            InputError: also for a `long_texts` that splits texts.
        """
        encoder = Encoder.load(bundle, **options)
        if not encoder.spec.scores_pairs:
            encoder.close()
            raise BundleError(f"{bundle} is an encoder, which has vectors and no scores: load it with Encoder.load")
        return cls(encoder)

    def scores(self, query: str, texts: Iterable[str], *, raw: bool = False) -> NDArray[np.float32]:
        """Score texts against a query.

        Args:
            query: the query.
            texts: any iterable of strings.
            raw: return the model's output itself; else its sigmoid, between 0 and 1. They rank alike.

        Returns:
            float32 [n] in the texts' order; higher is better.

        Raises:
            TextError: naming the first text that cannot be scored.
            InputError: `texts` is one string.
            EngineError: the engine failed.
        """
        found: NDArray[np.float32] = self.encoder.encode((query, cast(str, text)) for text in iterate(texts))[:, 0]
        return found if raw else sigmoid(found)

    def rank(self, query: str, texts: Iterable[str], top_n: int | None = None, *, raw: bool = False) -> list[Ranked]:
        """Score texts like `scores`; return the `top_n` best, or all, best first, equal ones in the texts' order."""
        if top_n is not None and (not isinstance(top_n, int) or top_n < 1):
            raise InputError(f"top_n is {top_n}: it must be a whole number of at least 1")
        return ranked(self.scores(query, texts, raw=True), top_n, raw_scores=raw)

    def close(self) -> None:
        """Release the engine. Closing twice is allowed."""
        self.encoder.close()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sigmoid(raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map raw scores to 0 to 1."""
    found: NDArray[np.float32] = np.exp(-np.logaddexp(0.0, -raw.astype(np.float64))).astype(np.float32)
    return found


def ranked(raw: NDArray[np.float32], top_n: int | None = None, *, raw_scores: bool = False) -> list[Ranked]:
    """Rank raw scores [n], before the sigmoid makes high ones equal."""
    order = np.argsort(-raw, kind="stable")[:top_n]
    shown = raw if raw_scores else sigmoid(raw)
    return [Ranked(int(at), float(shown[at])) for at in order]
