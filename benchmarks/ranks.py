"""Rank correlation and its bootstrap, as training/evaluate.py computes them: the same pairs give the same figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality_results import Estimate

RESAMPLES = 1000
CHUNK = 2_000_000
"""Numbers held at once while resampling: 16 MB each array."""

Floats = NDArray[np.float64]


def spearman(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> float:
    """Give the rank correlation, -1 to 1, with average ranks for ties; NaN where one side is constant."""
    return float(_correlations(np.asarray(x), np.asarray(y), np.ones((1, len(x))))[0])


def resample_spearman(
    x: Sequence[float] | Floats, y: Sequence[float] | Floats, *, seed: Sequence[int], resamples: int = RESAMPLES
) -> Floats:
    """Give the rank correlation of bootstrap resamples: pairs drawn with replacement, as many as there are.

    The same seed draws the same pairs, so that the differences of two parties on a set are paired.

    Returns:
        float64 [resamples]; NaN where a resample is constant on one side.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    random, n = np.random.default_rng(list(seed)), len(a)
    size = max(1, CHUNK // n)
    parts = [
        _correlations(a, b, random.multinomial(n, np.full(n, 1 / n), size=min(size, resamples - done)))
        for done in range(0, resamples, size)
    ]
    return np.concatenate(parts)


def estimate(value: float, draws: Floats, confidence: float = 95.0) -> Estimate:
    """Give a figure with the percentile interval of its resamples."""
    tail = (100 - confidence) / 2
    low, high = np.nanpercentile(draws, (tail, 100 - tail))
    return Estimate(value=value, low=float(low), high=float(high))


def _correlations(x: Floats, y: Floats, counts: NDArray[np.generic]) -> Floats:
    """Correlate ranks, once for each row of `counts` [resamples, n], which says how often a pair was drawn."""
    weights = counts.astype(np.float64)
    n = weights[0].sum()
    p, q = (_ranks(values, weights) - (n + 1) / 2 for values in (x, y))  # the mean of n average ranks
    covariance, vx, vy = ((weights * left * right).sum(axis=1) for left, right in ((p, q), (p, p), (q, q)))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations: Floats = covariance / np.sqrt(vx * vy)
    return correlations


def _ranks(values: Floats, counts: Floats) -> Floats:
    """Give each element's average rank in each resample, [resamples, n].

    A resample is a count for each pair: ranks follow from cumulated counts in an order that is sorted once.
    """
    groups = np.unique(values, return_inverse=True)[1]
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks: Floats = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return ranks[:, groups]
