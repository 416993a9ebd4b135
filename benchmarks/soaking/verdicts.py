"""The verdicts on a soak: slope of memory, drift of p99, unexpected ends, restarts, leftovers. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import linear_regression
from typing import NamedTuple

from benchmarks.report.statistics import median
from benchmarks.soaking.observations import ALL, Ending, MemorySample, Observations, WindowFigures

LEAST_HALF_S = 240.0
"""A slope over less time means nothing per hour: one more page cache or arena is hundreds of MB/hour then."""

LEAST_WINDOWS = 3
"""Of each third: a median of fewer is one window's chance."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits that a run must keep: see `growth` of `ALL`, `drift`, and the number of unexpected ends."""

    growth_mb_per_hour: float
    drift: float
    unexpected: int


class Verdict(NamedTuple):
    """One judgement: what was judged, whether it passed (None if the run was too short), and the figure."""

    name: str
    passed: bool | None
    finding: str


def judge(observed: Observations, thresholds: Thresholds) -> tuple[Verdict, ...]:
    """Compare what was observed with the thresholds."""
    errors = (
        f"{observed.unexpected} of {sum(observed.outcomes.values())} requests ended as none may "
        f"(at most {thresholds.unexpected}){'' if observed.answered else '; none had a right answer'}"
    )
    replaced = restarts(observed.memory)
    return (
        Verdict("errors", observed.unexpected <= thresholds.unexpected and observed.answered > 0, errors),
        Verdict("memory", *_judge_growth(observed.memory, thresholds.growth_mb_per_hour)),
        Verdict("p99 drift", *_judge_drift(drift(observed.windows), thresholds.drift)),
        Verdict("restarts", not replaced, f"the server was replaced {replaced} times (0)"),
        Verdict("end", *_judge_ending(observed.ending)),
    )


def second_half(samples: Sequence[MemorySample]) -> tuple[MemorySample, ...]:
    """Return the samples of the second half of the time: caches and arenas fill up in the first."""
    middle = (samples[0].at_s + samples[-1].at_s) / 2 if samples else 0.0
    return tuple(sample for sample in samples if sample.at_s >= middle)


def growth(samples: Sequence[MemorySample]) -> dict[str, float]:
    """Return the least-squares slope of each process name's memory, and of `ALL`, over the second half, in MB/hour.

    Empty with fewer than two samples there.
    """
    half = second_half(samples)
    if len(half) < 2:
        return {}
    hours = [sample.at_s / 3600 for sample in half]
    return {
        name: linear_regression(hours, [sample.resident_mb.get(name, 0.0) for sample in half]).slope
        for name in half[-1].resident_mb
    }


def drift(windows: Sequence[WindowFigures]) -> float | None:
    """Return the last third's median p99 of a window over the first third's; None with too few windows for that.

    Medians, so that one window disturbed by other work on the machine does not count as drift.
    """
    p99s = [window.p99_ms for window in windows if window.p99_ms is not None]
    third = len(p99s) // 3
    return median(p99s[-third:]) / median(p99s[:third]) if third >= LEAST_WINDOWS else None


def restarts(samples: Sequence[MemorySample]) -> int:
    """Count how often the tritonserver of a sample is another process than the one before."""
    pids = [sample.server for sample in samples if sample.server is not None]
    return sum(before != after for before, after in pairwise(pids))


def _judge_growth(samples: Sequence[MemorySample], most: float) -> tuple[bool | None, str]:
    half, slope = second_half(samples), growth(samples).get(ALL)
    if slope is None:
        return None, "not judged: too few samples of the server's memory"
    seconds = half[-1].at_s - half[0].at_s
    finding = f"{slope:+.1f} MB/hour over the last {seconds:.0f} s (at most {most:+.1f})"
    if seconds < LEAST_HALF_S:
        return None, f"not judged, which takes {LEAST_HALF_S:.0f} s: {finding}"
    return slope <= most, finding


def _judge_drift(value: float | None, most: float) -> tuple[bool | None, str]:
    if value is None:
        return None, f"not judged: it takes {3 * LEAST_WINDOWS} windows with answers"
    return value <= most, f"last third over first: {value:.2f} (at most {most:.2f})"


def _judge_ending(ending: Ending | None) -> tuple[bool | None, str]:
    if ending is None:
        return None, "not judged: the server never ran"
    if ending.by_itself:
        return False, f"the server ended by itself with status {ending.status}"
    how = "was killed: it did not end in time" if ending.status is None else f"ended with status {ending.status}"
    left = f"left {', '.join(ending.leftovers)}" if ending.leftovers else "left nothing"
    finding = f"at SIGTERM it {how} after {ending.seconds:.1f} s and {left} (status 0, nothing left)"
    return ending.status == 0 and not ending.leftovers, finding
