"""BERT-whitening (Su et al. 2021): one linear layer after which a corpus's vectors have mean 0 and covariance 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.errors import InputError

WHITENING_FILE = "whitening.json"
"""Records in a bundle what its whitening was fitted on. The weights are those of the last dense layer."""

SMALLEST_SHARE = 1e-8
"""Share of the largest variance: a direction with less is noise, which dividing by its deviation would amplify."""


@dataclass(frozen=True)
class Whitening:
    """The linear layer y = weight x + bias.

    Attributes:
        weight: float32 [dim, width].
        bias: float32 [dim].
        variance: share of the corpus's variance in the kept directions, 0 to 1.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    variance: float


def fit_whitening(vectors: NDArray[np.float32], dim: int) -> Whitening:
    """Fit a whitening on vectors, keeping the directions of largest variance.

    With mean m and covariance U diag(s) U^T, row i of the weight is U[:, i] / sqrt(s[i]) and the bias is -weight m.

    Args:
        vectors: float32 [n, width], pooled and not normalised.
        dim: directions to keep; with all of `width` the layer is lossless.

    Raises:
        InputError: there are too few vectors, or they span fewer directions.
    """
    count, width = vectors.shape
    if not 1 <= dim <= width:
        raise InputError(f"--whiten-dim is {dim}: the vectors have {width} components, so it must be 1 to {width}")
    if count <= dim:
        raise InputError(
            f"{count} texts cannot determine {dim} directions: whiten on more text, or with a smaller --whiten-dim"
        )
    exact = vectors.astype(np.float64)
    mean = exact.mean(0)
    centred = exact - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / count)  # ascending
    kept = variances[::-1][:dim]
    spanned = int((kept > SMALLEST_SHARE * variances[-1]).sum())
    if spanned < dim:
        raise InputError(
            f"the texts' vectors span only {spanned} directions: whiten on more varied text, or pass "
            f"--whiten-dim {spanned} or less"
        )
    weight = (directions[:, ::-1][:, :dim] / np.sqrt(kept)).T
    return Whitening(
        weight=weight.astype(np.float32),
        bias=(-weight @ mean).astype(np.float32),
        variance=float(kept.sum() / variances.sum()),
    )
