"""What a vector's numbers are once they have left the graph: their type, their count, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec, VectorType

LARGEST_INT8 = 127

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
    """Give the type of a vector's numbers: float32, float16, int8, or uint8 for packed bits."""
    return dtype_of_type(spec.vector_type)


def dtype_of_type(kind: VectorType) -> np.dtype[Any]:
    """Give the numpy type that vectors of a kind have."""
    return np.dtype(_DTYPES[kind])


def width_of(spec: EncoderSpec) -> int:
    """Give how many numbers a vector has: its components, or an eighth of them where they are packed bits."""
    return spec.dim // 8 if spec.vector_type is VectorType.BINARY else spec.dim


def round_vectors(values: NDArray[np.floating[Any]], spec: EncoderSpec) -> Vectors:
    """Bring components to a spec's vector type, as its graphs do.

    Args:
        values: floats [n, dim].
        spec: says to what.

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
    """Give the components that vectors stand for: int8 times its scale, a bit as 1 or -1, floats as they are.

    Cosines of the result are what an index that reads the vector type ranks by: for bits, 1 - 2 h / dim with the
    Hamming distance h.

    Args:
        vectors: [n, width].
        spec: whose they are.

    Returns:
        float32 [n, dim].
    """
    if spec.vector_type is VectorType.BINARY:
        return np.unpackbits(vectors, axis=-1).astype(np.float32) * 2 - 1
    if spec.vector_type is VectorType.INT8:
        return vectors.astype(np.float32) * np.float32(spec.int8_scale or 1.0)
    return vectors.astype(np.float32, copy=False)
