"""Texts to vectors, for every measure: each distinct text once, checked, and ranked by cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.errors import BundleError
from mirror_runtime.vectors import unit_rows

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to vectors, float32 [n, dim], before normalisation and rounding to a vector type."""

DECIMALS = 6
"""Cosines are rounded to this many decimals: the rest is fp32 rounding, and equal texts must tie."""

NEAREST = 10
"""Texts around each one that two encoders are compared by."""

TIE = 1e-6
"""Cosines that differ by less are equal: float32 rounds them to that, and texts that differ in blanks tie exactly."""

TEXTS_A_CALL = 256
"""Texts between two calls of `on_progress`."""

ROWS = 512
"""Rows of the similarity matrix held at once."""


def encode_distinct(
    encode: Encode,
    texts: Sequence[str],
    name: str = "the encoder",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, NDArray[np.float32]]:
    """Encode every distinct text once.

    Args:
        encode: the encoder.
        texts: with repeats.
        name: of the encoder, for errors.
        on_progress: called with the number of encoded texts and of all distinct texts.

    Raises:
        BundleError: vectors are not finite, or their number or dimension is not what the first call promised.
    """
    distinct = sorted(dict.fromkeys(texts), key=len)
    vectors: dict[str, NDArray[np.float32]] = {}
    dim = None
    on_progress(0, len(distinct))
    for start in range(0, len(distinct), TEXTS_A_CALL):
        part = distinct[start : start + TEXTS_A_CALL]
        found = np.asarray(encode(part), np.float32)
        if found.ndim != 2 or len(found) != len(part):
            raise BundleError(f"{name} returned an array of shape {found.shape} for {len(part)} texts")
        dim = dim or found.shape[1]
        if found.shape[1] != dim:
            raise BundleError(
                f"{name} returned vectors of {dim} components first and of {found.shape[1]} after {start} texts: "
                "it must not be replaced while it is measured"
            )
        if not np.isfinite(found).all():
            raise BundleError(f"{name} returns vectors that are not finite: its weights are broken")
        vectors.update(zip(part, found, strict=True))
        on_progress(len(vectors), len(distinct))
    return vectors


def unit_vectors(encode: Encode, *lists: Sequence[str]) -> list[NDArray[np.float32]]:
    """Encode lists of texts to unit vectors, float32 [n, dim] each; a text that occurs twice is encoded once."""
    raw = encode_distinct(encode, [text for texts in lists for text in texts])
    return [unit_rows(np.stack([raw[text] for text in texts])) for texts in lists]


def pair_cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of the unit vectors on the last axis of two arrays, rounded to `DECIMALS`: float64."""
    cosines: NDArray[np.float64] = (first.astype(np.float64) * second).sum(axis=-1).round(DECIMALS)
    return cosines


def ranks(
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    answers: NDArray[np.int64],
    left_out: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Return the rank, from 1, of each query's answer among all documents by cosine.

    Equal cosines share their mean rank, so that an encoder that does not distinguish texts ranks in the middle.

    Args:
        queries: unit vectors [n, dim].
        documents: unit vectors [m, dim].
        answers: the row of each query's answer, [n].
        left_out: a row that does not count for each query, such as its own, [n].
    """
    found = np.empty(len(queries))
    for start in range(0, len(queries), ROWS):
        here = slice(start, start + ROWS)
        scores = (queries[here] @ documents.T).round(DECIMALS)
        if left_out is not None:
            np.put_along_axis(scores, left_out[here, None], -np.inf, axis=1)
        own = np.take_along_axis(scores, answers[here, None], axis=1)
        found[here] = (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) + 1) / 2
    return found


def top_overlap(found: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    """Return the share of each text's `NEAREST` other texts that another encoder has too; ties count as shared.

    Of rerankers it is the share of the highest scores.

    Args:
        found: vectors [n, any width]; scores [n, 1].
        target: of the same texts, by the other encoder.
    """
    count = min(NEAREST, len(found) - 1)
    if count < 1:
        return 1.0
    theirs, ours = _similarities(target), _similarities(found)
    last = np.partition(theirs, -count, axis=1)[:, -count]
    chosen = np.argpartition(ours, -count, axis=1)[:, -count:]
    return float((np.take_along_axis(theirs, chosen, axis=1) >= last[:, None] - TIE).mean())


def _similarities(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosines of every two texts, and -2 of each with itself; or a reranker's scores as one row."""
    if vectors.shape[1] == 1:
        return vectors.T
    unit = unit_rows(vectors)
    similarities: NDArray[np.float32] = unit @ unit.T
    np.fill_diagonal(similarities, -2.0)
    return similarities
