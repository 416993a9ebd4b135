"""Samples to figures: percentiles, medians, and the interval of a ratio of medians. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

BOOTSTRAP_DRAWS = 2000

MOST_KEPT = 1000
"""Of a load test's samples, which come in tens of thousands: a report must stay small enough to commit."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float


def percentile(samples: Sequence[float], q: float) -> float:
    """Give the q-th percentile (0 to 100) by linear interpolation between the two nearest samples.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("a percentile needs at least one sample")
    return float(np.percentile(np.asarray(samples, np.float64), q))


def median(samples: Sequence[float]) -> float:
    """Give the median; see `percentile`."""
    return percentile(samples, 50)


def thin(samples: Sequence[float], most: int = MOST_KEPT) -> tuple[float, ...]:
    """Sort samples, and of more than `most` keep evenly spaced ranks, the extremes among them; to the microsecond."""
    ordered = np.sort(np.asarray(samples, np.float64))
    if ordered.size > most:
        ordered = ordered[np.linspace(0, ordered.size - 1, most).round().astype(np.int64)]
    return tuple(ordered.round(3).tolist())


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Ratio:
    """Divide two medians and give the 95 % percentile-bootstrap interval.

    Both sides are resampled on their own with replacement. With the handful of rounds of a benchmark the interval says
    how far the rounds scattered; it cannot see what all rounds had in common, such as a busy machine.
    """
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    random = np.random.default_rng(seed)
    tops = np.median(random.choice(top, (BOOTSTRAP_DRAWS, top.size)), axis=1)
    bottoms = np.median(random.choice(bottom, (BOOTSTRAP_DRAWS, bottom.size)), axis=1)
    low, high = np.percentile(tops / bottoms, (2.5, 97.5))
    return Ratio(value=median(numerator) / median(denominator), low=float(low), high=float(high))


def interleave(parties: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Yield (round, party) so that every party runs once a round: A B A B, never A A B B.

    A machine that slows down or speeds up over the run then does so for all parties alike.
    """
    for round_ in range(rounds):
        for party in parties:
            yield round_, party


def alternate(first: Sequence[T], second: Sequence[T]) -> list[T]:
    """Merge two groups so that their members take turns: a0 b0 a1 b1 …, what is left over at the end."""
    merged: list[T] = []
    for at in range(max(len(first), len(second))):
        merged += first[at : at + 1]
        merged += second[at : at + 1]
    return merged
