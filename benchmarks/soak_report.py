"""What a soak has observed, its verdicts, and its report: soak.json, soak.md for people, and soak.png over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.load.generator import Window
from benchmarks.load.servers import ALL, Ending
from benchmarks.load.targets import EXPECTED, Outcome
from benchmarks.recorder import Recorder
from benchmarks.report.record import Measurement
from benchmarks.report.statistics import median, percentile
from benchmarks.report.storage import measured_json, write_object
from benchmarks.report.tables import table_lines
from mirror_runtime.strict_json import to_json

SCHEMA_VERSION = 5
SOAK_FILE, MARKDOWN_FILE, PLOT_FILE = "soak.json", "soak.md", "soak.png"

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


def measure(observed: Observed, party: str) -> tuple[Measurement, ...]:
    """Return everything as measurements of suite "soak"."""
    memory, recorder = observed.memory, Recorder()
    names = dict.fromkeys(name for _, mb in memory for name in mb)
    rows: list[tuple[str, str, Sequence[float], dict[str, str]]] = [
        ("capacity", "1/s", [observed.capacity], {}),
        *(
            ("requests", "", [count], {"outcome": end, "expected": "yes" if Outcome(end) in EXPECTED else "no"})
            for end, count in observed.outcomes.items()
        ),
        ("end of a window", "s", [window.at_s for window in observed.windows], {}),
        ("p50 of a window", "ms", [window.p50_ms for window in observed.windows], {}),
        ("p99 of a window", "ms", [window.p99_ms for window in observed.windows], {}),
        ("sending lag p99", "ms", [window.lag_p99_ms for window in observed.windows], {}),
        ("time of a memory sample", "s", [at_s for at_s, _ in memory], {}),
        *(("resident memory", "MB", [mb.get(name, 0.0) for _, mb in memory], {"process": name}) for name in names),
        *(("growth of memory", "MB/h", [slope], {"process": name}) for name, slope in growth(memory).items()),
    ]
    for metric, unit, samples, conditions in rows:
        if samples:
            recorder.record("soak", party, metric, *samples, unit=unit, conditions=conditions)
    return recorder.measurements


def write_files(
    folder: Path, party: str, facts: Mapping[str, object], observed: Observed, verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Write the report's three files into a folder, and return the headline."""
    measured, p99s = measure(observed, party), [window.p99_ms for window in observed.windows]
    headline = {
        "schema_version": SCHEMA_VERSION,
        "partial": observed.partial,
        "passed": all(verdict.passed is not False for verdict in verdicts),
        "load_s": round(observed.load_s, 1),
        "requests": observed.outcomes.total(),
        "unexpected": observed.unexpected,
        "p99_ms": median(p99s) if p99s else None,
        "p99_drift": drift(observed.windows),
        "growth_mb_per_hour": growth(observed.memory).get(ALL),
    }
    problems = [(end, observed.outcomes[end], at_s, reason) for end, (at_s, reason) in observed.problems.items()]
    head = ("outcome", "count", "first_at_s", "first_reason")
    report = {
        **headline,
        "facts": to_json({"party": party, **facts}),
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "problems": [dict(zip(head, problem, strict=True)) for problem in problems],
        "ending": observed.ending and observed.ending._asdict(),
        "server_log": list(observed.log),
    }
    parts = [
        f"# Soak of {facts['bundle']}: {'within' if headline['passed'] else 'beyond'} its thresholds",
        "**Partial: the run was interrupted.** It covers less time than requested." * observed.partial,
        _table(
            ("what", "verdict", "found (threshold)"), [(name, WORDS[passed], found) for name, passed, found in verdicts]
        ),
        _table(("unexpected", "requests", "first at s", "first error"), problems),
        f"![Memory and p99 over time]({PLOT_FILE})",
        "Times count from the moment a request was due: a window with a sending lag includes the generator's own. "
        "Generator and server share the machine's cores.",
    ]
    write_object(folder / SOAK_FILE, {**report, **measured_json(measured, ())})
    (folder / MARKDOWN_FILE).write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    draw(observed).savefig(folder / PLOT_FILE, dpi=120)
    return headline


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return table_lines(head, [[" ".join(str(cell).split()) for cell in row] for row in rows]) if rows else ""


def draw(observed: Observed) -> Figure:
    """Draw memory by process, with the half that the slope is fitted to, above p50 and p99 of each window."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set(ylabel="resident memory, MB", title="Shaded: the half that the slope is fitted to")
    below.set(ylabel="milliseconds to a right answer", xlabel="minutes of load")
    if memory := observed.memory:
        for name in memory[-1][1]:
            above.plot([at_s / 60 for at_s, _ in memory], [mb.get(name, 0.0) for _, mb in memory], label=name)
        half = second_half(memory)
        above.axvspan(half[0][0] / 60, half[-1][0] / 60, color="gray", alpha=0.12)
    for label in ("p99", "p50"):
        times = [getattr(window, f"{label}_ms") for window in observed.windows]
        below.plot([window.at_s / 60 for window in observed.windows], times, label=label)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
        if axes.get_lines():
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
