"""Response bodies. Vectors are serialised from NumPy: 100 of 384 components would be 38,400 Python objects."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence

import numpy as np
import orjson
from numpy.typing import NDArray


def openai_body(
    vectors: NDArray[np.float32], *, model: str, tokens: int, truncated: Sequence[int], base64: bool
) -> bytes:
    """Build the response body of /v1/embeddings from contiguous vectors [n, dim].

    `tokens` are those of all texts together, `truncated` the positions of the truncated ones. `base64` encodes vectors
    as little-endian float32, instead of lists of numbers.
    """
    rows = [b64encode(row).decode("ascii") for row in vectors] if base64 else vectors
    return orjson.dumps(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "truncated": truncated,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def tei_body(vectors: NDArray[np.float32]) -> bytes:
    """Build the response body of /embed: the vectors [n, dim] as lists of numbers."""
    return orjson.dumps(vectors, option=orjson.OPT_SERIALIZE_NUMPY)
