"""The table of a static twin: token vectors whose mean is nearest to a teacher's vectors, by ridge regression.

The vector of a text of n tokens is the sum of their rows, divided by n. For a corpus that is a product X W of a sparse
matrix of counts and the table, so the table that is nearest to the teacher's vectors Y is a linear least-squares
problem: min |X W - Y|² + ridge |W - P|². The prior P holds the teacher's vector of each token alone, without what all
of these have in common, weighted by a / (a + its frequency) (SIF, Arora et al. 2017): it decides where the corpus says
little.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mirror_runtime.extras import require

FloatArray = NDArray[np.float32]

RARE = 1e-3
"""SIF's a: a token of this share of all tokens has half the weight of the rarest. 1e-2 and 1e-4 were worse (MiniLM)."""

RIDGE = 1e-3
"""Weight of the prior: the best of 1e-3, 1e-2, 0.1 and 1 with MiniLM, on the sets that the log reports."""

ITERATIONS, TOLERANCE = 60, 1e-3
"""Of the conjugate gradients."""


def share_matrix(tokenizer: Tokenizer, texts: Sequence[str], limit: int, size: int) -> Any:
    """Return each token's share of each text, a sparse float32 matrix [texts, size] whose rows sum to 1, or to 0."""
    rows = [encoding.ids[:limit] for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    lengths = np.array([len(row) for row in rows])
    shares = np.repeat(1 / np.maximum(lengths, 1), lengths).astype(np.float32)
    ids = np.fromiter((token for row in rows for token in row), np.int32, int(lengths.sum()))
    found = require("scipy.sparse", "train").csr_matrix(
        (shares, ids, np.concatenate([[0], lengths.cumsum()])), (len(rows), size)
    )
    found.sum_duplicates()
    return found


def weighted_prior(alone: FloatArray, shares: Any, vectors: FloatArray) -> FloatArray:
    """Centre the tokens' own vectors, weight each by its frequency, and scale all to the length of the texts' vectors.

    Vectors of tokens alone are more alike than those of texts: as they are, a table is much worse on other text.

    Args:
        alone: the teacher's vector of each token, [size, dim].
        shares: see `share_matrix`.
        vectors: the teacher's vectors of the texts, [texts, dim].
    """
    frequency = (np.asarray(shares.sum(axis=0)).ravel() + 1) / (shares.shape[0] + shares.shape[1])
    prior: FloatArray = (alone - alone.mean(axis=0)) * (RARE / (RARE + frequency)).astype(np.float32)[:, None]
    guess = shares @ prior
    return prior * np.float32((guess * vectors).sum() / max((guess * guess).sum(), 1e-12))


def fit_table(
    shares: Any, vectors: FloatArray, prior: FloatArray, ridge: float, on_progress: Callable[[int, int], None]
) -> FloatArray:
    """Return the table, float32 [size, dim]; tokens that do not occur keep their prior.

    Memory: about eight arrays of the size of the occurring tokens' rows.
    """
    linalg = require("scipy.sparse.linalg", "train")
    occurring = np.unique(shares.indices)
    shares = shares[:, occurring]
    turned = shares.T.tocsr()
    wanted = turned @ (vectors - shares @ prior[occurring])
    steps = itertools.count(1)

    def product(flat: FloatArray) -> FloatArray:
        rows = flat.reshape(wanted.shape)
        result: FloatArray = (turned @ (shares @ rows) + np.float32(ridge) * rows).ravel()
        return result

    # All columns are one vector to the library: their problems share the matrix, and so converge alike.
    operator = linalg.LinearOperator((wanted.size, wanted.size), matvec=product, dtype=np.float32)
    change, _ = linalg.cg(
        operator,
        wanted.ravel(),
        rtol=TOLERANCE,
        maxiter=ITERATIONS,
        callback=lambda _: on_progress(next(steps), ITERATIONS),
    )
    table = prior.copy()
    table[occurring] += change.reshape(wanted.shape)
    return table
