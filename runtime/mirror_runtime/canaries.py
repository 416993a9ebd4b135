"""Compare newly computed vectors of a bundle's canaries with the stored ones: is this still the same vector space?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import Canary, EncoderSpec
from mirror_runtime.encoded import Encoded
from mirror_runtime.vectors import agreement, components, distance_problem

DIFFERENT_MODEL_BELOW = 0.9
"""No precision and no CPU rounds this far: vectors below this cosine come from another model."""


class CanaryVerdict(str, Enum):
    """The result of comparing canaries."""

    AGREES = "agrees"
    DRIFTED = "drifted"
    """The same model, but less exact than the floor allows: another CPU, precision or library."""
    ANOTHER_MODEL = "another model"
    """The vectors are finite but have little in common with the stored ones."""
    BROKEN = "broken"
    """Vectors are missing, of another length, or not finite."""


@dataclass(frozen=True, kw_only=True)
class CanaryComparison:
    """How far the canaries' vectors are from the stored ones."""

    verdict: CanaryVerdict
    problem: str = ""  # for people; empty where the vectors agree
    min_cosine: float | None = None  # the worst canary's; None where the vectors cannot be compared
    max_abs_diff: float | None = None  # of one component; None likewise


def mean_rows(vectors: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Average each text's vectors: float32 [sum of counts, dim], `counts` [n] of at least 1, to [n, dim]."""
    sums: NDArray[np.float32] = np.add.reduceat(vectors, np.cumsum(counts) - counts)
    return sums / counts[:, None].astype(np.float32)


def canary_vectors(encoded: Encoded, spec: EncoderSpec) -> NDArray[np.float32]:
    """Return what a bundle stores of its canaries, [n, dim]: their components, or with pooling `tokens` their means.

    Raises:
        TextError: one of them has no vector.
    """
    vectors = components(encoded.vectors_or_raise(), spec)
    return vectors if encoded.counts is None else mean_rows(vectors, encoded.counts)


def compare_canaries(vectors: NDArray[np.generic], canaries: Sequence[Canary], floor: float) -> CanaryComparison:
    """Compare vectors' components [n, dim] with the stored ones, see `distance_problem`."""
    found = vectors.astype(np.float64)
    expected = np.array([canary.vector for canary in canaries], np.float64)
    if found.shape != expected.shape:
        return CanaryComparison(
            verdict=CanaryVerdict.BROKEN, problem=f"vectors are {found.shape} where {expected.shape} is stored"
        )
    if not np.isfinite(found).all():
        return CanaryComparison(verdict=CanaryVerdict.BROKEN, problem="vectors are not finite")
    worst = float(agreement(found, expected).min())
    problem = distance_problem(found, expected, floor, [canary.text for canary in canaries])
    verdict = CanaryVerdict.AGREES
    if worst < min(DIFFERENT_MODEL_BELOW, floor):
        verdict, problem = CanaryVerdict.ANOTHER_MODEL, f"another model's vectors: cosine {worst:.6f}"
    elif problem:
        verdict, problem = CanaryVerdict.DRIFTED, f"vectors drifted: {problem}"
    return CanaryComparison(
        verdict=verdict, problem=problem, min_cosine=worst, max_abs_diff=float(np.abs(found - expected).max())
    )
