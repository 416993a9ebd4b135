"""Figures with their uncertainty: rank correlations and means, resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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


class Verdict(str, Enum):
    """What a change did to a figure."""

    BETTER = "better"
    """The whole interval of the difference is above zero."""
    UNCLEAR = "no clear change"
    WORSE = "worse"
    """The whole interval is below zero, or below the loss that is tolerated."""

    @classmethod
    def of(cls, gain: Estimate, tolerance: float = 0.0) -> Verdict:
        """Judge a difference: better if its interval is above zero, worse if it is below `-tolerance`."""
        return cls.WORSE if gain.high < -tolerance else cls.BETTER if gain.low > 0 else cls.UNCLEAR


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure of one task on one set. Shares, ranks and correlations are times 100."""

    task: str  # such as "retrieval"
    set: str  # the file's or folder's name, without suffix
    metric: str  # such as "nDCG@10"; higher is better unless the metric is a loss
    figure: Estimate
    samples: int  # queries, pairs or texts that were drawn from
    resampled: NDArray[np.float64] = field(repr=False, compare=False)  # the figure of each bootstrap resample

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Task, set, metric and samples, which two results that are compared share."""
        return self.task, self.set, self.metric, self.samples

    def to_json(self) -> dict[str, Any]:
        """Return all fields except the resamples as JSON values."""
        head = {"task": self.task, "set": self.set, "metric": self.metric}
        return head | flat("value", self.figure) | {"samples": self.samples}


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How figures are resampled. The same seed draws the same items for every encoder: differences are paired."""

    resamples: int = 1000
    seed: int = 0

    def rng(self) -> np.random.Generator:
        """Return a new generator, the same each time."""
        return np.random.default_rng(self.seed)

    def mean(self, task: str, name: str, metric: str, items: ArrayLike) -> Result:
        """Build the result of a metric that is the mean over items, each 0 to 1, times 100."""
        scores = 100 * np.asarray(items, dtype=np.float64)
        drawn = resample_means(scores, self.resamples, self.rng())
        return self.result(task, name, metric, float(scores.mean()), drawn, len(scores))

    def spearman(self, task: str, name: str, metric: str, cosines: ArrayLike, scores: ArrayLike) -> Result:
        """Build the result of a rank correlation, times 100; neither side may be constant."""
        drawn = 100 * resample_spearman(cosines, scores, self.resamples, self.rng())
        return self.result(task, name, metric, 100 * spearman(cosines, scores), drawn, len(np.asarray(scores)))

    def result(
        self, task: str, name: str, metric: str, value: float, resampled: NDArray[np.float64], samples: int
    ) -> Result:
        """Build a result from its resampled values, which must come from `rng`."""
        figure = estimate(value, resampled)
        return Result(task=task, set=name, metric=metric, figure=figure, samples=samples, resampled=resampled)


def gains(before: Sequence[Result], after: Sequence[Result]) -> list[Estimate]:
    """Subtract one encoder's results from another's on the same sets and seed, with paired intervals.

    Raises:
        ValueError: the results are of different sets.
    """
    if [one.key for one in before] != [one.key for one in after]:
        raise ValueError("the results are of different sets")
    return [
        estimate(new.figure.value - old.figure.value, new.resampled - old.resampled)
        for old, new in zip(before, after, strict=True)
    ]


def flat(name: str, figure: Estimate) -> dict[str, float]:
    """Return an estimate as JSON values `NAME`, `NAME_low` and `NAME_high`."""
    return {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}


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


def resample_means(items: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the means of bootstrap resamples, each n items drawn with replacement from n: float64 [resamples]."""
    n = len(items)
    size = max(1, CHUNK // n)
    chunks = [min(size, resamples - start) for start in range(0, resamples, size)]
    return np.concatenate([rng.multinomial(n, np.full(n, 1 / n), size=rows) @ items / n for rows in chunks])


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
