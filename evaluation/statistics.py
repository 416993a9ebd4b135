"""Rank correlation with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirror_runtime.extras import require

CHUNK = 4_000_000
"""Numbers in memory at once while resampling: 32 MB an array."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and the interval that holds 95 % of its resampled values."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, sign: str) -> str:
        """Format as `value [low, high]` with two decimals; `+` shows the sign."""
        return f"{self.value:{sign}.2f} [{self.low:{sign}.2f}, {self.high:{sign}.2f}]"


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return the rank correlation, -1 to 1, with average ranks for ties; NaN if one side is constant."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(require("scipy.stats", "train").spearmanr(a, b).statistic)


def resample_spearman(x: ArrayLike, y: ArrayLike, resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the rank correlation of bootstrap resamples, each n pairs drawn with replacement from n.

    A resample is a count for each pair. Its ranks follow from cumulative counts in an order that is sorted once, so
    that no resample needs sorting.

    Returns:
        float64 [resamples]; NaN if a resample is constant on one side.
    """
    # Each value's index among the distinct values in ascending order.
    a, b = (np.unique(np.asarray(values), return_inverse=True)[1] for values in (x, y))
    n = len(a)
    results = []
    chunk = max(1, CHUNK // n)
    for size in (min(chunk, resamples - start) for start in range(0, resamples, chunk)):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        ranks = [_ranks(groups, counts) for groups in (a, b)]
        centred = [rank - (n + 1) / 2 for rank in ranks]  # the mean of n average ranks
        covariance, va, vb = (
            (counts * p * q).sum(axis=1)
            for p, q in ((centred[0], centred[1]), (centred[0], centred[0]), (centred[1], centred[1]))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            results.append(covariance / np.sqrt(va * vb))
    return np.concatenate(results)


def estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    """Build an estimate with the 95 % percentile interval of the resampled values; NaNs are ignored."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(value=value, low=float(low), high=float(high))


def _ranks(groups: NDArray[np.int64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each element's average rank in each resample: [resamples, n]."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks: NDArray[np.float64] = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return ranks[:, groups]
