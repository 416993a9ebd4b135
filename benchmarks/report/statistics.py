"""Samples to figures: percentiles, medians, and bootstrap intervals of ratios of medians."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import Estimate, estimate

BOOTSTRAP_DRAWS = 2000

FIGURES = {"min": 0.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}
"""Figures of a measurement by name, as percentiles of its samples."""


def percentile(samples: Sequence[float], q: float) -> float:
    """Return the q-th percentile (0 to 100), interpolated linearly between the two nearest samples."""
    if not samples:
        raise ValueError("a percentile needs at least one sample")
    return float(np.percentile(np.asarray(samples, np.float64), q))


def median(samples: Sequence[float]) -> float:
    """Return the median; see `percentile`."""
    return percentile(samples, 50)


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Estimate:
    """Divide two medians, with a 95 % percentile-bootstrap interval; both sides are resampled independently."""
    random = np.random.default_rng(seed)
    tops, bottoms = (resampled_medians(side, random) for side in (numerator, denominator))
    return estimate(median(numerator) / median(denominator), tops / bottoms)


def resampled_medians(samples: Sequence[float], random: np.random.Generator) -> NDArray[np.float64]:
    """Return the medians of bootstrap resamples, float64 [BOOTSTRAP_DRAWS]."""
    values = np.asarray(samples, np.float64)
    medians: NDArray[np.float64] = np.median(random.choice(values, (BOOTSTRAP_DRAWS, values.size)), axis=1)
    return medians
