"""Score texts by the vectors of their tokens: MaxSim (ColBERT, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.errors import InputError


def max_sim(queries: Sequence[NDArray[np.float32]], documents: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Score every document for every query: over the query's tokens, the sum of the nearest token's similarity.

    Args:
        queries: the vectors of each query's tokens, [tokens, dim], of unit length if cosines are wanted.
        documents: likewise, at least one token each.

    Returns:
        float32 [queries, documents], as `retrieval.score` takes them; higher is nearer.

    Raises:
        InputError: documents are missing, or one has no tokens.
    """
    lengths = np.array([len(document) for document in documents])
    if not lengths.size or not lengths.all():
        raise InputError(f"document {int(lengths.argmin()) if lengths.size else 0} has no vector of a token")
    tokens, starts = np.concatenate(documents), np.cumsum(lengths) - lengths
    scores = np.empty((len(queries), len(documents)), np.float32)
    for row, query in zip(scores, queries, strict=True):
        row[:] = np.maximum.reduceat(query @ tokens.T, starts, axis=1).sum(axis=0)
    return scores
