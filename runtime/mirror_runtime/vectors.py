"""Vectors as they leave the graph: their data type, width, components, cosines and distances."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec, VectorType
from mirror_runtime.errors import InputError

LARGEST_INT8 = 127

SMALLEST_NORM = 1e-12
"""Norms below this count as this, so that a vector of zeros stays one instead of becoming NaN."""

SHOWN_TEXTS = 3
"""The worst texts that `distance_problem` quotes."""

Vectors = NDArray[Any]
"""[n, width] of `dtype_of` a spec."""

_DTYPES: Mapping[VectorType, type[np.generic]] = MappingProxyType(
    {
        VectorType.FLOAT32: np.float32,
        VectorType.FLOAT16: np.float16,
        VectorType.INT8: np.int8,
        VectorType.BINARY: np.uint8,
    }
)


def dtype_of(spec: EncoderSpec) -> np.dtype[Any]:
    """Return the data type of a spec's vectors: float32, float16, int8, or uint8 for packed bits."""
    return dtype_of_vector_type(spec.vector_type)


def dtype_of_vector_type(kind: VectorType) -> np.dtype[Any]:
    """Return the data type of a vector type."""
    return np.dtype(_DTYPES[kind])


def width_of(spec: EncoderSpec) -> int:
    """Return the length of a vector's array: `dim`, or `dim / 8` bytes where the components are packed bits."""
    return spec.dim // 8 if spec.vector_type is VectorType.BINARY else spec.dim


def round_vectors(values: NDArray[np.floating[Any]], spec: EncoderSpec) -> Vectors:
    """Convert components to a spec's vector type, as its graphs do.

    Args:
        values: floats [n, dim].
        spec: the encoder's.

    Returns:
        [n, width]: see `VectorType`.
    """
    if spec.vector_type is VectorType.BINARY:
        return np.packbits(values > 0, axis=-1)
    if spec.vector_type is VectorType.INT8:
        scaled: Vectors = np.rint(values / np.float32(spec.int8_scale or 1.0)).clip(-LARGEST_INT8, LARGEST_INT8)
        return scaled.astype(np.int8)
    return values.astype(dtype_of(spec), copy=False)


def components(vectors: Vectors, spec: EncoderSpec) -> NDArray[np.float32]:
    """Convert vectors to their components: int8 times its scale, a bit to 1 or -1, floats unchanged.

    Cosines of the result rank as an index of the vector type ranks: for bits, the cosine is 1 - 2 h / dim with the
    Hamming distance h.

    Args:
        vectors: [n, width].
        spec: the encoder's.

    Returns:
        float32 [n, dim].
    """
    if spec.vector_type is VectorType.BINARY:
        return np.unpackbits(vectors, axis=-1).astype(np.float32) * 2 - 1
    if spec.vector_type is VectorType.INT8:
        return vectors.astype(np.float32) * np.float32(spec.int8_scale or 1.0)
    return vectors.astype(np.float32, copy=False)


def unit_rows(vectors: NDArray[Any]) -> NDArray[Any]:
    """Scale each row of floats [n, dim] to unit L2 norm, in their own data type; rows of zeros stay zeros."""
    units: NDArray[Any] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), SMALLEST_NORM)
    return units


def check_cuts(cuts: Iterable[int], dim: int, trained: Collection[int], *, multiple: int = 1) -> None:
    """Check that vectors of `dim` components may be cut to each of these numbers, as `--dimensions` names them.

    Raises:
        InputError: one of them is not smaller, not a multiple, or none of those that the encoder was trained for;
            `trained` is empty for an encoder that records none, which may be cut to any number.
    """
    for number in cuts:
        if trained and number not in trained:
            raise InputError(f"--dimensions {number}: this encoder was trained for {', '.join(map(str, trained))}")
        if not 0 < number < dim or number % multiple:
            what = f", a multiple of {multiple}" if multiple > 1 else ""
            raise InputError(f"--dimensions {number}: this encoder's vectors have {dim}; choose fewer{what}")


def cut(vectors: Vectors, dimensions: int | None, *, normalize: bool) -> Vectors:
    """Keep the leading components of vectors (Matryoshka).

    Args:
        vectors: [n, width] of any vector type, which their data type tells.
        dimensions: components to keep; a multiple of 8 for binary vectors. None keeps all.
        normalize: scale floats to unit length after cutting. Int8 and binary vectors are compared by cosine and by
            Hamming distance, which need no length, and are never scaled.

    Returns:
        [n, dimensions], or [n, dimensions / 8] bytes of packed bits, of the same data type.
    """
    if vectors.dtype == _DTYPES[VectorType.BINARY]:
        return vectors if dimensions is None else vectors[:, : dimensions // 8]
    kept = vectors[:, :dimensions]
    if not normalize or vectors.dtype == _DTYPES[VectorType.INT8]:
        return kept
    return unit_rows(kept.astype(np.float32, copy=False)).astype(vectors.dtype, copy=False)


def cosines(
    left: NDArray[Any], right: NDArray[Any], dtype: type[np.floating[Any]] = np.float64
) -> NDArray[np.floating[Any]]:
    """Compute the cosine of each pair of rows.

    Args:
        left: components [n, dim], see `components`.
        right: likewise.
        dtype: in which to compute.

    Returns:
        [n] of `dtype`; 0 where a row is zeros.
    """
    a, b = left.astype(dtype, copy=False), right.astype(dtype, copy=False)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: NDArray[np.floating[Any]] = (a * b).sum(1) / np.maximum(norms, SMALLEST_NORM)
    return found


def agreement(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """Compute the cosine of each pair of rows like `cosines`, but 1 where both rows are zeros.

    A reranker's scores, [n, 1], have no direction: their agreement is 1 - d² / 2 with d the difference in standard
    deviations of the expected ones, so that a floor bounds d as it bounds the distance of unit vectors.
    """
    if expected.shape[1] == 1:
        close: NDArray[np.floating[Any]] = 1 - relative_distance(found, expected) ** 2 / 2
        return close
    similar = cosines(found, expected)
    similar[~found.any(axis=1) & ~expected.any(axis=1)] = 1.0
    return similar


def relative_distance(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Compute each row's distance from the expected one, relative to its length, or to the spread of all scores."""
    exact = expected.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    if exact.shape[1] == 1 and lengths.size:
        lengths = np.full(len(exact), exact.std() or lengths.max())
    distances: NDArray[np.float64] = np.linalg.norm(found.astype(np.float64) - exact, axis=1)
    distances /= np.maximum(lengths, SMALLEST_NORM)
    return distances


def distance_problem(found: NDArray[Any], expected: NDArray[Any], floor: float, texts: Sequence[object]) -> str:
    """Describe which vectors are too far from the expected ones.

    The cosine alone does not notice a missing normalisation; the difference relative to the expected vector's length
    does. Its bound sqrt(2 - 2 floor) means for unit vectors exactly what the floor means.

    Args:
        found: finite components [n, dim].
        expected: components [n, dim].
        floor: the smallest cosine allowed.
        texts: the n texts, of which the message quotes the worst.

    Returns:
        The message; empty where all vectors are close enough.
    """
    similar = agreement(found, expected)
    relative = relative_distance(found, expected)
    bound = math.sqrt(2 - 2 * floor)
    bad = (similar < floor) | (relative > bound)
    if not bad.any():
        return ""
    worst = "; ".join(
        f"{quoted(texts[i])} cosine {similar[i]:.6f}, off by {relative[i]:.2g} of its length"
        for i in np.argsort(-relative)[:SHOWN_TEXTS]
    )
    return (
        f"{int(bad.sum())} of {len(texts)} texts (cosine below {floor} or off by more than {bound:.2g} of its length). "
        f"Worst: {worst}"
    )


def quoted(text: object, limit: int = 60) -> str:
    """Quote a text for a message, shortened to about `limit` characters."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[:limit]}…' ({len(shown) - 2} characters)"


def rows_not_finite(vectors: Vectors) -> list[int]:
    """List the rows that hold NaN or infinity."""
    # A sum of integers is finite, and one of floats is exactly where all of them are: a fraction of the full check.
    if np.isfinite(vectors.sum(dtype=np.float64)):
        return []
    rows: list[int] = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
    return rows
