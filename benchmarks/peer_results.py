"""What a report holds of others: libraries on the same weights, and recipes on the same corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.point import Point


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One batch size of a peer's sweep over a part of the workload."""

    batch_size: int
    texts: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PeerResult:
    """Another library on the same weights and texts, in its own environment, at its best batch size.

    Attributes:
        version: of the library itself.
        precision: what the library says it computes in.
        threads: what the library says it uses; None where it does not say.
    """

    peer: str
    backend: str
    version: str
    precision: str
    threads: int | None
    versions: Mapping[str, str]
    load_s: float
    sweep: tuple[SweepPoint, ...]
    batch_size: int
    texts: int
    samples_s: tuple[float, ...]
    texts_per_s: float
    texts_per_s_min: float
    texts_per_s_max: float

    @property
    def name(self) -> str:
        """Peer and backend."""
        return f"{self.peer} {self.backend}"


@dataclass(frozen=True, kw_only=True)
class SingleTexts:
    """One text a call, warm, in turns with the other parties.

    Attributes:
        party: our engine and precision, or a peer and its backend.
        ours: whether it is one of our artifacts.
        tokens: exact length of every text, special tokens included.
    """

    party: str
    ours: bool
    tokens: int
    samples_ms: tuple[float, ...]
    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Our median rate over a peer's, from rounds that took turns, and how far the vectors agree.

    Attributes:
        ratio_low, ratio_high: 95 % bootstrap interval over the rounds.
        min_cosine, mean_cosine: the peer's vectors to ours over the workload.
    """

    point: Point
    peer: str
    ratio: float
    ratio_low: float
    ratio_high: float
    min_cosine: float
    mean_cosine: float


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One tuning run in a process of its own.

    Attributes:
        seconds: from process start to the saved folder.
        spearman: of each evaluation set, x 100.
        mean: over the sets.
    """

    seed: int
    seconds: float
    spearman: Mapping[str, float]
    mean: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """One recipe over several seeds, in rounds that took turns with the others.

    Attributes:
        party: whose code and which recipe.
        base: the encoder that was tuned.
        median_s: of the runs' seconds.
    """

    party: str
    base: str
    pooling: str
    corpus: str
    texts: int
    runs: tuple[TrainingRun, ...]
    median_s: float
