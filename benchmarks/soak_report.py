"""What a soak has observed, its verdicts, and its report, soak.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any, NamedTuple

from benchmarks.load.generator import Window
from benchmarks.load.servers import ALL, Ending
from benchmarks.report.statistics import median, percentile
from benchmarks.report.storage import write_object
from mirror_runtime.strict_json import to_json

SCHEMA_VERSION = 5
SOAK_FILE = "soak.json"

LEAST_HALF_S = 240.0
"""A slope over less time means nothing per hour: one more page cache or arena is hundreds of MB/hour then."""

LEAST_WINDOWS = 3
"""Of each third: a median of fewer is one window's chance."""

WORDS = {True: "passed", False: "FAILED", None: "not judged"}

Memory = Sequence[tuple[float, Mapping[str, float]]]
"""Seconds since the load began, and the server's resident MB by process name."""


class Figures(NamedTuple):
    """What is kept of a window with right answers: its end in seconds of load, times, and how late it was sent."""

    at_s: float
    p50_ms: float
    p99_ms: float
    lag_p99_ms: float


@dataclass(kw_only=True)
class Observed:
    """What a soak has observed so far. It is complete at any moment, so an interrupted run has a report.

    Its size grows with the windows and not with the requests.

    Attributes:
        capacity: right answers per second of the closed loop before the load.
        outcomes: requests by `Outcome`, those of that closed loop included.
        problems: when the first request of each unexpected outcome ended, and its error.
        restarts: how often the tritonserver was replaced.
        load_s: how long requests have arrived.
        partial: the run was interrupted.
        log: what `mirror serve` wrote to standard error.
        ending: None if the server never ran.
    """

    capacity: float = 0.0
    windows: list[Figures] = field(default_factory=list)
    memory: list[tuple[float, Mapping[str, float]]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: dict[str, tuple[float, str]] = field(default_factory=dict)
    restarts: int = 0
    load_s: float = 0.0
    partial: bool = False
    log: Sequence[str] = ()
    ending: Ending | None = None

    def count(self, window: Window) -> None:
        """Count how requests ended in a window."""
        self.outcomes += window.outcomes
        self.problems = {**window.first, **self.problems}

    def add(self, window: Window) -> None:
        """Count a window of the load, and keep its figures if it has a right answer."""
        self.count(window)
        if times := window.times_ms:
            p50, p99 = (percentile(times, q) for q in (50, 99))
            self.windows.append(Figures(window.at_s, p50, p99, window.lag_p99_ms))

    @property
    def unexpected(self) -> int:
        """Requests that ended as none may."""
        return sum(self.outcomes[outcome] for outcome in self.problems)


class Verdict(NamedTuple):
    """One judgement: what was judged, whether it passed (None if the run was too short), and the figure."""

    name: str
    passed: bool | None
    finding: str


def judge(observed: Observed, max_growth: float, max_drift: float) -> list[Verdict]:
    """Compare what was observed with the thresholds: MB per hour, and the ratio of `drift`."""
    half, slope, ratio = second_half(observed.memory), growth(observed.memory).get(ALL), drift(observed.windows)
    seconds = half[-1][0] - half[0][0] if half else 0.0
    grew = "unknown" if slope is None else f"{slope:+.1f} MB/hour over the last {seconds:.0f} s"
    drifted = "unknown" if ratio is None else f"{ratio:.2f}"
    answered = "" if observed.windows else "; none had a right answer"
    return [
        Verdict(
            "errors", not observed.unexpected and bool(observed.windows),
            f"{observed.unexpected} of {observed.outcomes.total()} requests ended as none may (0){answered}",
        ),
        Verdict(
            "memory", None if slope is None or seconds < LEAST_HALF_S else slope <= max_growth,
            f"{grew} (at most {max_growth:+.1f}, over {LEAST_HALF_S:.0f} s or more)",
        ),
        Verdict(
            "p99 drift", None if ratio is None else ratio <= max_drift,
            f"last third over first: {drifted} (at most {max_drift:.2f}, of {3 * LEAST_WINDOWS} windows or more)",
        ),
        Verdict("restarts", not observed.restarts, f"the server was replaced {observed.restarts} times (0)"),
        Verdict("end", *_judge_ending(observed.ending)),
    ]  # fmt: skip


def _judge_ending(ending: Ending | None) -> tuple[bool | None, str]:
    if ending is None:
        return None, "the server never ran"
    if ending.by_itself:
        return False, f"the server ended by itself with status {ending.status}"
    how = "was killed: it did not end in time" if ending.status is None else f"ended with status {ending.status}"
    left = ", ".join(ending.leftovers) or "nothing"
    finding = f"at SIGTERM it {how} after {ending.seconds:.1f} s and left {left} (status 0, nothing left)"
    return ending.status == 0 and not ending.leftovers, finding


def second_half(memory: Memory) -> Memory:
    """Return the samples in the second half of the time: caches and arenas fill up in the first."""
    return [sample for sample in memory if 2 * sample[0] >= memory[0][0] + memory[-1][0]]


def growth(memory: Memory) -> dict[str, float]:
    """Return the least-squares slope of each process name's memory over the second half, in MB/hour.

    Empty with fewer than two samples there.
    """
    half = second_half(memory)
    if len(half) < 2:
        return {}
    hours = [at_s / 3600 for at_s, _ in half]
    return {name: linear_regression(hours, [mb.get(name, 0.0) for _, mb in half]).slope for name in half[-1][1]}


def drift(windows: Sequence[Figures]) -> float | None:
    """Return the last third's median p99 of a window over the first third's; None with too few windows for that.

    Medians, so that one window disturbed by other work on the machine does not count as drift.
    """
    p99s, third = [window.p99_ms for window in windows], len(windows) // 3
    return median(p99s[-third:]) / median(p99s[:third]) if third >= LEAST_WINDOWS else None


def write_report(
    folder: Path, party: str, facts: Mapping[str, object], observed: Observed, verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Write the report into a folder, and return its headline."""
    p99s, slopes = [window.p99_ms for window in observed.windows], growth(observed.memory)
    headline = {
        "schema_version": SCHEMA_VERSION,
        "partial": observed.partial,
        "passed": all(verdict.passed is not False for verdict in verdicts),
        "load_s": round(observed.load_s, 1),
        "requests": observed.outcomes.total(),
        "unexpected": observed.unexpected,
        "p99_ms": median(p99s) if p99s else None,
        "p99_drift": drift(observed.windows),
        "growth_mb_per_hour": slopes.get(ALL),
    }
    report = {
        **headline,
        "facts": to_json({"party": party, **facts}),
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "problems": [
            {"outcome": end, "count": observed.outcomes[end], "first_at_s": at_s, "first_reason": reason}
            for end, (at_s, reason) in observed.problems.items()
        ],
        "ending": observed.ending and observed.ending._asdict(),
        "capacity_per_s": observed.capacity,
        "outcomes": observed.outcomes,
        "growth_by_process": slopes,
        "windows": [window._asdict() for window in observed.windows],
        "memory_mb": [{"at_s": at_s, **mb} for at_s, mb in observed.memory],
        "server_log": list(observed.log),
    }
    write_object(folder / SOAK_FILE, report)
    return headline
