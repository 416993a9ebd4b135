"""What a report holds of scaling: cost against the number of texts, of cores and of callers."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.point import Point


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """So many different texts through `encode_stream`, each time in a fresh process.

    Attributes:
        tokens: useful tokens of all texts.
        samples_s: seconds from the first text to the last vector, one a process.
        us_per_text: microseconds of a text in the median process.
        first_bytes: the process's peak resident memory when it had the first window's vectors; median.
        peak_bytes: at the end; median.
    """

    texts: int
    tokens: int
    samples_s: tuple[float, ...]
    us_per_text: float
    first_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class CoresResult:
    """The whole workload in a process whose affinity leaves it so many cores.

    Attributes:
        streams: that the engine chose.
        samples_s: seconds of a pass, one a round.
        cpu_s: processor seconds of each of these passes, over all threads.
        cpu_share: the most processor seconds a second of any round: above `cores` cannot be, near it is full use.
    """

    cores: int
    streams: int
    texts: int
    samples_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    texts_per_s: float
    cpu_share: float


@dataclass(frozen=True, kw_only=True)
class FullQueue:
    """Callers that meet a queue which is full.

    Attributes:
        max_waiting: texts that may wait.
        sent: calls of one text: one wave that fills the queue, then waves of as many as there are callers.
        accepted: calls that were not refused.
        answered: of these, those that got a vector.
        min_cosine: the worst similarity of these vectors to those of the same texts offline.
        refused_samples_ms: from when a call was due until it was refused; of many, evenly spaced ranks.
    """

    max_waiting: int
    sent: int
    accepted: int
    answered: int
    min_cosine: float
    refused_samples_ms: tuple[float, ...]
    refused_p50_ms: float | None
    refused_max_ms: float | None

    @property
    def refused(self) -> int:
        """Calls that were refused."""
        return self.sent - self.accepted


@dataclass(frozen=True, kw_only=True)
class CallersResult:
    """Concurrent asyncio callers of single texts, in turns with one `encode` of the same texts.

    Attributes:
        callers: at once, each asking for its next text when it has the last one's vector.
        offline_samples_s, callers_samples_s: seconds for all texts, one a round.
        share: of the offline rate that the callers reach; medians.
    """

    callers: int
    texts: int
    offline_samples_s: tuple[float, ...]
    callers_samples_s: tuple[float, ...]
    share: float
    queue: FullQueue


@dataclass(frozen=True, kw_only=True)
class ScalingResult:
    """How one artifact scales; what is not measured yet, or failed, is missing."""

    point: Point
    sizes: tuple[SizeResult, ...]
    cores: tuple[CoresResult, ...]
    callers: CallersResult | None

    def ratio(self, size: SizeResult) -> float | None:
        """Give a text's time at a size over that at the size nearest to 10,000; None where that is this very size."""
        base = min(self.sizes, key=lambda one: abs(one.texts - 10_000))
        return None if size is base else size.us_per_text / base.us_per_text
