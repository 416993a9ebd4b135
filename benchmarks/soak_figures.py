"""A soak's series to figures and verdicts: slope of memory, drift of p99, what is beyond its threshold. Arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from benchmarks.soak_results import Ending, MemorySample, Thresholds, Times, Verdict, Window
from benchmarks.summary import median, percentile

ALL = "all"
"""The name of all processes together among the slopes."""

LEAST_HALF_S = 240.0
"""A slope over less says nothing of an hour: one page cache or arena more is hundreds of MB/hour by then."""

LEAST_WINDOWS = 3
"""Of each third, or its median is one window's chance."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the verdicts are about.

    Attributes:
        requests: that ended, in whatever way.
        right: of these, with a right answer.
        unexpected: of these, as none may end.
        growth_mb_per_hour: of all processes; None with too few samples.
        growth_over_s: the seconds that it was fitted over.
        p99_drift: None with too few windows.
        restarts: how often the server was another process than before.
        ending: None where the server never ran.
    """

    requests: int
    right: int
    unexpected: int
    growth_mb_per_hour: float | None
    growth_over_s: float
    p99_drift: float | None
    restarts: int
    ending: Ending | None


def times_of(samples_ms: Sequence[float]) -> Times | None:
    """Give the figures of some right answers' times; None without any."""
    if not samples_ms:
        return None
    return Times(
        requests=len(samples_ms),
        p50_ms=percentile(samples_ms, 50),
        p99_ms=percentile(samples_ms, 99),
        p999_ms=percentile(samples_ms, 99.9),
    )


def slope(moments: Sequence[float], values: Sequence[float]) -> float:
    """Give the least-squares slope of values over moments, in the values' unit per the moments'.

    Raises:
        ValueError: there are fewer than two different moments.
    """
    at = np.asarray(moments, np.float64)
    if at.size < 2 or np.ptp(at) == 0:
        raise ValueError("a slope needs values at two different moments")
    at = at - at.mean()
    return float(at @ np.asarray(values, np.float64) / (at @ at))


def second_half(samples: Sequence[MemorySample]) -> tuple[MemorySample, ...]:
    """Give the samples of the second half of the time: the first is left to caches and arenas that fill up once."""
    if not samples:
        return ()
    middle = (samples[0].at_s + samples[-1].at_s) / 2
    return tuple(sample for sample in samples if sample.at_s >= middle)


def growth(samples: Sequence[MemorySample]) -> dict[str, float]:
    """Give the slope of each process name's resident memory, and of `ALL`, over the second half, in MB/hour.

    Empty with fewer than two samples there.
    """
    half = second_half(samples)
    if len(half) < 2:
        return {}
    moments = [sample.at_s / 3600 for sample in half]
    series = {name: [by_name(sample).get(name, 0.0) for sample in half] for name in by_name(half[-1])}
    series[ALL] = [sample.total_mb for sample in half]
    return {name: slope(moments, values) for name, values in series.items()}


def by_name(sample: MemorySample) -> dict[str, float]:
    """Add up the resident memory of the processes of each name, in MB."""
    sums: dict[str, float] = {}
    for process in sample.processes:
        sums[process.name] = sums.get(process.name, 0.0) + process.resident_mb
    return sums


def drift(windows: Sequence[Window]) -> float | None:
    """Give the last third's median p99 of a window over the first third's; None with too few windows for that.

    Medians: one window that something else on the machine disturbed is no drift.
    """
    p99s = [window.times.p99_ms for window in windows if window.times is not None]
    third = len(p99s) // 3
    if third < LEAST_WINDOWS:
        return None
    return median(p99s[-third:]) / median(p99s[:third])


def restarts(samples: Sequence[MemorySample]) -> int:
    """Count how often the tritonserver of a sample is another process than the one before."""
    pids = [process.pid for sample in samples for process in sample.processes if process.name == "tritonserver"]
    return sum(before != after for before, after in pairwise(pids))


def judge(found: Findings, thresholds: Thresholds) -> tuple[Verdict, ...]:
    """Hold what was found against the thresholds."""
    errors = f"{found.unexpected} of {found.requests} requests ended as none may (at most {thresholds.unexpected})"
    if not found.right:
        errors += "; none had a right answer"
    return (
        Verdict(name="errors", passed=found.unexpected <= thresholds.unexpected and found.right > 0, says=errors),
        _judge_growth(found, thresholds.growth_mb_per_hour),
        _judge_drift(found.p99_drift, thresholds.drift),
        Verdict(name="restarts", passed=not found.restarts, says=f"the server was replaced {found.restarts} times (0)"),
        _judge_ending(found.ending),
    )


def counted(outcomes: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Add up windows' outcomes."""
    sums: dict[str, int] = {}
    for one in outcomes:
        for name, count in one.items():
            sums[name] = sums.get(name, 0) + count
    return sums


def _judge_growth(found: Findings, most: float) -> Verdict:
    name, value = "memory", found.growth_mb_per_hour
    if value is None:
        return Verdict(name=name, passed=None, says="not judged: too few samples of the server's memory")
    says = f"{value:+.1f} MB/hour over the last {found.growth_over_s:.0f} s (at most {most:+.1f})"
    if found.growth_over_s < LEAST_HALF_S:
        return Verdict(name=name, passed=None, says=f"not judged, which takes {LEAST_HALF_S:.0f} s: {says}")
    return Verdict(name=name, passed=value <= most, says=says)


def _judge_drift(value: float | None, most: float) -> Verdict:
    name = "p99 drift"
    if value is None:
        return Verdict(name=name, passed=None, says=f"not judged: it takes {3 * LEAST_WINDOWS} windows with answers")
    return Verdict(name=name, passed=value <= most, says=f"last third over first: {value:.2f} (at most {most:.2f})")


def _judge_ending(ending: Ending | None) -> Verdict:
    name = "end"
    if ending is None:
        return Verdict(name=name, passed=None, says="not judged: the server never ran")
    if ending.by_itself:
        return Verdict(name=name, passed=False, says=f"the server ended by itself with status {ending.status}")
    how = "was killed: it did not end in time" if ending.status is None else f"ended with status {ending.status}"
    left = f"left {', '.join(ending.left)}" if ending.left else "left nothing"
    return Verdict(
        name=name,
        passed=ending.status == 0 and not ending.left,
        says=f"at SIGTERM it {how} after {ending.seconds:.1f} s and {left} (status 0, nothing left)",
    )
