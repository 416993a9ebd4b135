"""What a report holds of quality: scored pairs, each party's cosines on them, and the figures made of both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class QualitySet:
    """Pairs of texts that people scored.

    Attributes:
        group: "sts" or "words".
        sha256: of the set's file.
        scores: one a pair; only their order counts.
    """

    name: str
    group: str
    sha256: str
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """One party on one set.

    Attributes:
        name: of the set.
        cosines: one a pair, rounded to six decimals, for comparisons of reports; empty for a peer.
        spearman: rank correlation of cosines and scores, x 100, over the whole set at once.
        delta: minus the baseline's, with the interval over the same resamples of pairs; None for the baseline itself
            and where there is none.
    """

    name: str
    cosines: tuple[float, ...]
    spearman: Estimate
    delta: Estimate | None


@dataclass(frozen=True, kw_only=True)
class QualityResult:
    """What one party's vectors are worth.

    Attributes:
        party: our engine and precision, or a peer and its backend.
        ours: an artifact of the bundle; else a peer.
        baseline: the party that deltas and the overlap compare with: the bundle's own fp32; None where it cannot run.
        scores: in the order of the report's sets.
        mean: over the sets with equal weight, x 100.
        mean_delta: minus the baseline's.
        top10_overlap: share of each text's ten nearest texts that are also the baseline's, mean over the texts.
        texts: distinct texts of all sets, among which the nearest were looked for.
    """

    party: str
    ours: bool
    baseline: str | None
    scores: tuple[SetScore, ...]
    mean: Estimate
    mean_delta: Estimate | None
    top10_overlap: float | None
    texts: int
