"""A soak's verdicts and its report: soak.json, soak.md for people, and soak.png with memory and p99 over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.load.generator import Window
from benchmarks.load.servers import ALL, Ending
from benchmarks.load.targets import EXPECTED, Outcome
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better, Measurement
from benchmarks.report.statistics import median, percentile
from benchmarks.report.storage import measured_json, write_object
from benchmarks.report.tables import table_lines
from mirror_runtime.bundle import to_json

SCHEMA_VERSION = 4
SOAK_FILE, MARKDOWN_FILE, PLOT_FILE = "soak.json", "soak.md", "soak.png"

LEAST_HALF_S = 240.0
"""A slope over less time means nothing per hour: one more page cache or arena is hundreds of MB/hour then."""

LEAST_WINDOWS = 3
"""Of each third: a median of fewer is one window's chance."""

LATE_MS = 20.0
"""If requests are sent later than this at p99, their times include waiting for the generator."""

_LOG_LINES = 20
WORDS = {True: "passed", False: "FAILED", None: "not judged"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the run: see the command's help."""

    engine: str
    precision: str
    minutes: float
    share: float
    window_s: float
    max_growth: float
    max_drift: float
    max_unexpected: int
    seed: int


@dataclass(kw_only=True)
class Observed:
    """What a soak has observed so far. It is complete at any moment, so an interrupted run has a report.

    Attributes:
        before: the closed loop that measures the capacity.
        windows: of the load.
        memory: seconds since the load began, and the server's resident MB by process name.
        restarts: how often the tritonserver was replaced.
        load_s: how long requests have arrived.
        partial: the run was interrupted.
        log: what `mirror serve` wrote to standard error.
        ending: None if the server never ran.
    """

    before: Window = field(default_factory=Window)
    windows: list[Window] = field(default_factory=list)
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    restarts: int = 0
    load_s: float = 0.0
    partial: bool = False
    log: Sequence[str] = ()
    ending: Ending | None = None

    @property
    def unexpected(self) -> int:
        """Requests that ended as none may, those before the load included."""
        return sum(window.unexpected for window in (self.before, *self.windows))


class Verdict(NamedTuple):
    """One judgement: what was judged, whether it passed (None if the run was too short), and the figure."""

    name: str
    passed: bool | None
    finding: str


def judge(observed: Observed, settings: Settings) -> list[Verdict]:
    """Compare what was observed with the thresholds."""
    count = sum(window.requests for window in observed.windows)
    answered = any(window.times_ms for window in observed.windows)
    errors = (
        f"{observed.unexpected} of {count} requests ended as none may (at most {settings.max_unexpected})"
        f"{'' if answered else '; none had a right answer'}"
    )
    return [
        Verdict("errors", observed.unexpected <= settings.max_unexpected and answered, errors),
        Verdict("memory", *_judge_growth(observed, settings.max_growth)),
        Verdict("p99 drift", *_judge_drift(drift(observed), settings.max_drift)),
        Verdict("restarts", not observed.restarts, f"the server was replaced {observed.restarts} times (0)"),
        Verdict("end", *_judge_ending(observed.ending)),
    ]


def _judge_growth(observed: Observed, most: float) -> tuple[bool | None, str]:
    half, slope = second_half(observed), growth(observed).get(ALL)
    if slope is None:
        return None, "not judged: too few samples of the server's memory"
    seconds = half[-1][0] - half[0][0]
    finding = f"{slope:+.1f} MB/hour over the last {seconds:.0f} s (at most {most:+.1f})"
    if seconds < LEAST_HALF_S:
        return None, f"not judged, which takes {LEAST_HALF_S:.0f} s: {finding}"
    return slope <= most, finding


def _judge_drift(ratio: float | None, most: float) -> tuple[bool | None, str]:
    if ratio is None:
        return None, f"not judged: it takes {3 * LEAST_WINDOWS} windows with answers"
    return ratio <= most, f"last third over first: {ratio:.2f} (at most {most:.2f})"


def _judge_ending(ending: Ending | None) -> tuple[bool | None, str]:
    if ending is None:
        return None, "not judged: the server never ran"
    if ending.by_itself:
        return False, f"the server ended by itself with status {ending.status}"
    how = "was killed: it did not end in time" if ending.status is None else f"ended with status {ending.status}"
    left = ", ".join(ending.leftovers) or "nothing"
    finding = f"at SIGTERM it {how} after {ending.seconds:.1f} s and left {left} (status 0, nothing left)"
    return ending.status == 0 and not ending.leftovers, finding


def second_half(observed: Observed) -> list[tuple[float, dict[str, float]]]:
    """Return the memory in the second half of the time: caches and arenas fill up in the first."""
    memory = observed.memory
    return [sample for sample in memory if 2 * sample[0] >= memory[0][0] + memory[-1][0]]


def growth(observed: Observed) -> dict[str, float]:
    """Return the least-squares slope of each process name's memory over the second half, in MB/hour.

    Empty with fewer than two samples there.
    """
    half = second_half(observed)
    if len(half) < 2:
        return {}
    hours = [at_s / 3600 for at_s, _ in half]
    return {name: linear_regression(hours, [mb.get(name, 0.0) for _, mb in half]).slope for name in half[-1][1]}


def drift(observed: Observed) -> float | None:
    """Return the last third's median p99 of a window over the first third's; None with too few windows for that.

    Medians, so that one window disturbed by other work on the machine does not count as drift.
    """
    p99s = [percentile(window.times_ms, 99) for window in observed.windows if window.times_ms]
    third = len(p99s) // 3
    return median(p99s[-third:]) / median(p99s[:third]) if third >= LEAST_WINDOWS else None


def find_problems(observed: Observed) -> list[dict[str, Any]]:
    """Return how often requests ended as none may, those before the load included, with the first of each outcome."""
    problems: dict[str, dict[str, Any]] = {}
    for window in (observed.before, *observed.windows):
        for outcome, (at_s, reason) in window.first.items():
            reason = f"before the load: {reason}" if window is observed.before else reason
            new = {"outcome": outcome, "count": 0, "first_at_s": at_s, "first_reason": reason}
            problems.setdefault(outcome, new)["count"] += window.outcomes[outcome]
    return list(problems.values())


def measure(observed: Observed, party: str, share: float) -> tuple[Measurement, ...]:
    """Return everything as measurements of suite "soak"; the load offered was a share of the capacity."""
    windows, memory = observed.windows, observed.memory
    answered = [window for window in windows if window.times_ms]
    capacity = [observed.before.rate] if observed.before.times_ms else []
    times = {ALL: [ms for window in answered for ms in window.times_ms]}
    for label in sorted({label for window in answered for label in window.answered_ms}):
        times[label] = [ms for window in answered for ms in window.answered_ms.get(label, ())]
    ends = sum((window.outcomes for window in windows), Counter[str]())
    names = dict.fromkeys(name for _, mb in memory for name in mb)
    rows: list[tuple[str, str, Sequence[float], dict[str, str]]] = [
        ("requests per second", "1/s", capacity, {"loop": "closed"}),
        ("requests per second", "1/s", [share * rate for rate in capacity], {"loop": "open"}),
        *(("time per request", "ms", samples, {"request": label}) for label, samples in times.items()),
        *(
            ("requests", "", [count], {"outcome": end, "expected": "yes" if Outcome(end) in EXPECTED else "no"})
            for end, count in ends.items()
        ),
        ("end of a window", "s", [window.at_s for window in answered], {}),
        *((f"p{q} of a window", "ms", [percentile(one.times_ms, q) for one in answered], {}) for q in (50, 99)),
        ("sending lag p99", "ms", [window.lag_p99_ms for window in windows], {}),
        ("time of a memory sample", "s", [at_s for at_s, _ in memory], {}),
        *(("resident memory", "MB", [mb.get(name, 0.0) for _, mb in memory], {"process": name}) for name in names),
        *(("growth of memory", "MB/h", [slope], {"process": name}) for name, slope in growth(observed).items()),
    ]
    recorder = Recorder()
    for metric, unit, samples, conditions in rows:
        if samples:
            better = Better.LOWER if metric == "time per request" else Better.NEITHER
            recorder.record("soak", party, metric, *samples, unit=unit, better=better, conditions=conditions)
    return recorder.measurements


def write_files(
    folder: Path, party: str, settings: Settings, facts: Mapping[str, object], observed: Observed
) -> dict[str, Any]:
    """Write the report's three files into a folder, and return the headline."""
    measured, verdicts = measure(observed, party, settings.share), judge(observed, settings)
    p99_ms = [one.figure("p99") for one in measured if one.conditions.get("request") == ALL]
    headline = {
        "schema_version": SCHEMA_VERSION,
        "partial": observed.partial,
        "passed": all(verdict.passed is not False for verdict in verdicts),
        "load_s": round(observed.load_s, 1),
        "requests": sum(window.requests for window in observed.windows),
        "unexpected": observed.unexpected,
        "p99_ms": p99_ms[0] if p99_ms else None,
        "p99_drift": drift(observed),
        "growth_mb_per_hour": growth(observed).get(ALL),
    }
    report = {
        **headline,
        "facts": to_json({"party": party, "settings": settings, **facts}),
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "problems": find_problems(observed),
        "ending": observed.ending and observed.ending._asdict(),
        "server_log": list(observed.log),
    }
    write_object(folder / SOAK_FILE, {**report, **measured_json(measured, ())})
    (folder / MARKDOWN_FILE).write_text(render(report, measured), encoding="utf-8")
    draw(observed, folder / PLOT_FILE)
    return headline


def render(report: Mapping[str, Any], measured: Sequence[Measurement]) -> str:
    """Render the report as Markdown."""
    lags = [lag for one in measured if one.metric == "sending lag p99" for lag in one.samples]
    late = [lag for lag in lags if lag > LATE_MS]
    verdicts = [(verdict["name"], WORDS[verdict["passed"]], verdict["finding"]) for verdict in report["verdicts"]]
    figures = [
        [
            ", ".join((one.metric, *(f"{name} {value}" for name, value in one.conditions.items()))),
            *(one.unit, f"{one.total:,}", f"{one.samples[0]:,.1f}", f"{one.samples[-1]:,.1f}"),
            *(f"{one.figure(name):,.1f}" for name in ("p50", "p99", "p99.9")),
        ]
        for one in measured
    ]
    facts = [
        (name, ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value)
        for name, value in report["facts"].items()
    ]
    parts = [
        f"# Soak of {report['facts']['bundle']}: {'within' if report['passed'] else 'beyond'} its thresholds",
        "**Partial: the run was interrupted.** It covers less time than requested." * report["partial"],
        _table(("what", "verdict", "found (threshold)"), verdicts),
        _table(
            ("unexpected", "requests", "first at s", "first error"), [[*one.values()] for one in report["problems"]]
        ),
        f"![Memory and p99 over time]({PLOT_FILE})",
        f"**In {len(late)} of {len(lags)} windows the generator sent requests more than {LATE_MS:.0f} ms late at p99: "
        "the times there include that.**" * bool(late),
        "Times count from the moment a request was due. Generator and server share the machine's cores.",
        _table(("measured", "unit", "samples", "first", "last", "p50", "p99", "p99.9"), figures),
        _table((), facts),
        "```\n" + "\n".join(report["server_log"][-_LOG_LINES:]) + "\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return table_lines(head, [[" ".join(str(cell).split()) for cell in row] for row in rows]) if rows else ""


def draw(observed: Observed, path: Path) -> None:
    """Draw memory by process, with the half that the slope is fitted to, above p50 and p99 of each window."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set(ylabel="resident memory, MB", title="Shaded: the half that the slope is fitted to")
    below.set(ylabel="milliseconds to a right answer", xlabel="minutes of load")
    if memory := observed.memory:
        for name in memory[-1][1]:
            above.plot([at_s / 60 for at_s, _ in memory], [mb.get(name, 0.0) for _, mb in memory], label=name)
        half = second_half(observed)
        above.axvspan(half[0][0] / 60, half[-1][0] / 60, color="gray", alpha=0.12)
    answered = [window for window in observed.windows if window.times_ms]
    for q in (99, 50):
        times = [percentile(window.times_ms, q) for window in answered]
        below.plot([window.at_s / 60 for window in answered], times, label=f"p{q}")
    bad = [window.at_s / 60 for window in observed.windows if window.unexpected]
    below.plot(bad, [0.0] * len(bad), "kx", label="unexpected ends", clip_on=False)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
        if axes.get_lines():
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, format="png")
