"""How close an artifact's vectors must be to the reference's, by precision and vector type."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mirror_runtime.bundle import EncoderSpec, Precision, VectorType

FLOORS = {
    Precision.FP32: 0.99999,
    Precision.FP16: 0.9999,
    Precision.BF16: 0.9995,
    Precision.INT8: 0.98,
    Precision.FP8: 0.98,
}
"""The smallest cosine to the reference allowed for any text."""

SCORE_FLOORS = {Precision.FP32: 0.99999, Precision.FP16: 0.999, Precision.BF16: 0.995}
"""The smallest agreement of a reranker's score, see `vectors.agreement`: in bf16 a difference of 0.1 deviations.

One number has no other components to average its rounding: 0.028 deviations in bf16 (MiniLM, 581 pairs, 2026-11-30).
"""

BATCH_INVARIANCE_FLOOR = 0.999
"""The smallest cosine between a text's vectors in two batches, where the precision's own floor is lower."""

CHANCE_STEPS = 4
"""Components of an int8 vector that may be rounded the other way."""

CHANCE_OF_BITS = 1e-4
"""Probability that a binary vector at the largest angle allowed has more flipped bits than its floor allows."""


@dataclass(frozen=True, kw_only=True)
class Floors:
    """The smallest cosines allowed for any text, and for the average of all texts."""

    reference: float
    batch_invariance: float  # between a text's vectors in two different batches
    mean: float  # to the references' vectors; it exceeds `reference` where chance decides single texts

    @classmethod
    def of(cls, precision: Precision, spec: EncoderSpec) -> Floors:
        """Return the floors of a precision for an encoder's vectors.

        Bits are coarse: vectors at an angle of a differ in a share a / pi of their bits on average, and one bit of 384
        is already a cosine of 0.995. The number of bits that flip in one text is chance, but the average over many
        texts is not: the average is held to the precision's angle, each text to what is rare at that angle.
        """
        if spec.scores_pairs:
            floor = SCORE_FLOORS[precision]
            return cls(reference=floor, batch_invariance=floor, mean=floor)
        reference, invariance = FLOORS[precision], max(FLOORS[precision], BATCH_INVARIANCE_FLOOR)
        if spec.vector_type is VectorType.BINARY:
            mean = 1 - 2 * math.acos(reference) / math.pi
            reference, invariance = (
                1 - (2 * _most_flips(math.acos(cosine) / math.pi, spec.dim) + 1) / spec.dim  # half a bit of margin
                for cosine in (reference, invariance)
            )
            return cls(reference=reference, batch_invariance=invariance, mean=mean)
        if spec.int8_scale is not None and spec.normalize:
            reference, invariance = (
                cosine - _rounding_loss(cosine, spec.dim, spec.int8_scale) for cosine in (reference, invariance)
            )
        return cls(reference=reference, batch_invariance=invariance, mean=reference)


def _most_flips(share: float, dim: int) -> int:
    """Return how many of `dim` bits flip at most, each with probability `share`, except with `CHANCE_OF_BITS`."""
    within = 0.0
    for flips in range(dim + 1):
        within += math.comb(dim, flips) * share**flips * (1 - share) ** (dim - flips)
        if within >= 1 - CHANCE_OF_BITS:
            return flips
    return dim


def _rounding_loss(cosine: float, dim: int, step: float) -> float:
    """Estimate how much rounding to int8 can reduce the cosine of two unit vectors.

    A difference of d in a component becomes a whole step with probability d / step, which adds d step to the squared
    distance on average; over all components that is at most sqrt(dim) times their distance times the step.
    """
    return (step * math.sqrt(2 * (1 - cosine) * dim) + CHANCE_STEPS * step**2) / 2
