"""A soak's report as files: soak.json, soak.md for people, and soak.png with memory and p99 over time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.load.window import EXPECTED
from benchmarks.report.facts import Host, Source
from benchmarks.report.plots import LIGHT
from benchmarks.report.statistics import percentile
from benchmarks.report.storage import measured_json, write_object
from benchmarks.report.tables import table_lines
from benchmarks.soaking.observations import ALL, Observations
from benchmarks.soaking.verdicts import Thresholds, Verdict, drift, growth, judge, second_half
from benchmarks.workload import WorkloadFacts
from mirror_runtime.bundle import to_json

SCHEMA_VERSION = 3
SOAK_FILE, MARKDOWN_FILE, PLOT_FILE = "soak.json", "soak.md", "soak.png"

LATE_MS = 20.0
"""If requests are sent later than this at p99, their times include waiting for the generator."""

_LOG_LINES = 20
WORDS = {True: "passed", False: "FAILED", None: "not judged"}
NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the run: see the command's help."""

    engine: str
    precision: str
    minutes: float
    share: float
    window_s: float
    seed: int
    thresholds: Thresholds


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was served, and what its vectors were compared with.

    Attributes:
        name: the bundle's folder.
        floor: cosine to the expected vector below which a vector is wrong: the floor of the artifact's certificate.
        canaries: texts whose expected vectors are the reference's own, from the bundle. The others' were computed in
            process by the artifact that served.
        long_texts: texts joined to about the encoder's limit; the others are the workload's.
    """

    name: str
    fingerprint: str
    engine: str
    precision: str
    floor: float
    canaries: int
    long_texts: int


@dataclass(frozen=True, kw_only=True)
class SoakReport:
    """Everything about one soak."""

    started: str
    host: Host
    versions: dict[str, str]
    source: Source
    subject: Subject
    workload: WorkloadFacts
    settings: Settings
    observed: Observations

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts on what was observed."""
        return judge(self.observed, self.settings.thresholds)

    @property
    def passed(self) -> bool:
        """Whether nothing that was judged is beyond its threshold."""
        return all(verdict.passed is not False for verdict in self.verdicts)

    def headline(self, output: Path) -> dict[str, Any]:
        """Return the object that ends standard output."""
        observed = self.observed
        times = dict(observed.times()).get(ALL)
        return {
            "report": str(output / SOAK_FILE),
            "schema_version": SCHEMA_VERSION,
            "partial": observed.partial,
            "passed": self.passed,
            "load_s": round(observed.load_s, 1),
            "requests": sum(observed.outcomes.values()),
            "unexpected": observed.unexpected,
            "p99_ms": percentile(times, 99) if times else None,
            "p99_drift": drift(observed.windows),
            "growth_mb_per_hour": growth(observed.memory).get(ALL),
        }


def write_files(report: SoakReport, folder: Path) -> None:
    """Write a report's three files into a folder."""
    observed, subject = report.observed, report.subject
    _draw(report, folder / PLOT_FILE)
    (folder / MARKDOWN_FILE).write_text(render(report), encoding="utf-8")
    party = f"{subject.engine} {subject.precision}"
    facts = {name: to_json(getattr(report, name)) for name in ("host", "source", "subject", "workload", "settings")}
    write_object(
        folder / SOAK_FILE,
        {
            **report.headline(Path(".")),
            "started": report.started,
            "versions": report.versions,
            **facts,
            "verdicts": [verdict._asdict() for verdict in report.verdicts],
            "problems": [
                {
                    "outcome": end,
                    "count": n,
                    "first_at_s": observed.first[end].at_s,
                    "first_reason": observed.first[end].reason,
                }
                for end, n in observed.problems.items()
            ],
            "ending": to_json(observed.ending),
            "server_log": list(observed.server_log),
            **measured_json(observed.measurements(party, report.settings.share), ()),
        },
    )


def render(report: SoakReport) -> str:
    """Render the report as Markdown."""
    observed = report.observed
    parts = [f"# Soak of {report.subject.name}: {'within' if report.passed else 'beyond'} its thresholds"]
    if observed.partial:
        parts.append("**Partial: the run was interrupted.** It covers less time than requested.")
    marks = {**WORDS, False: "**FAILED**"}
    verdicts = [(v.name, marks[v.passed], v.finding) for v in report.verdicts]
    parts += [
        table_lines(("what", "verdict", "found (threshold)"), verdicts),
        f"![Memory and p99 over time]({PLOT_FILE})",
        "## Conditions",
        table_lines((), _conditions(report)),
        _caveats(report),
        "## Times of right answers",
        "From the moment a request was due to its checked answer, by protocol and texts per request.",
        table_lines(
            ("request", "requests", "p50 ms", "p99 ms", "p99.9 ms"),
            [
                (label, f"{len(times):,}", *(f"{percentile(times, q):.1f}" for q in (50, 99, 99.9)))
                for label, times in observed.times()
            ]
            or [(ALL, "0", NONE, NONE, NONE)],
        ),
        "## How requests ended",
        table_lines(
            ("end", "requests", "expected"),
            [(end, f"{n:,}", "yes" if end in EXPECTED else "**no**") for end, n in observed.outcomes.most_common()]
            or [(NONE, "0", NONE)],
        ),
    ]
    if observed.problems:
        rows = [
            (end, str(n), f"{observed.first[end].at_s:.1f}", " ".join(observed.first[end].reason.split()))
            for end, n in observed.problems.most_common()
        ]
        parts += ["## Unexpected", table_lines(("end", "requests", "first at s", "first error"), rows)]
    if observed.memory:
        parts += ["## Resident memory", table_lines(("process", "begin MB", "end MB", "MB/hour"), _memory(observed))]
    if observed.server_log:
        parts += ["## The server's log", "```\n" + "\n".join(observed.server_log[-_LOG_LINES:]) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _conditions(report: SoakReport) -> list[tuple[str, str]]:
    host, subject, work, settings = report.host, report.subject, report.workload, report.settings
    observed, source = report.observed, report.source
    commit = NONE if source.commit is None else source.commit[:12] + (" with local changes" if source.dirty else "")
    load = NONE
    if (capacity := observed.capacity_per_s) is not None:
        load = (
            f"{settings.share * capacity:.1f} requests per second at random (Poisson): {settings.share:g} of the "
            f"{capacity:.1f} that a closed loop of the same mix reached on the same cores"
        )
    texts = f"{work.texts} ({work.source}; mean {work.tokens_mean:.1f} tokens), {subject.long_texts} long texts"
    run = f"load for {observed.load_s:.0f} s of {60 * settings.minutes:.0f} s, windows of {settings.window_s:g} s"
    return [
        ("Machine", f"{host.cpu_model}, {host.cores_usable} of {host.cores_online} logical cores usable"),
        ("System", f"{host.os}, Python {host.python}"),
        ("Load average before", f"{host.load_1min_start:.2f} (1 min)"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("Commit", commit),
        ("Bundle", f"{subject.name}, fingerprint `{subject.fingerprint}`, {subject.engine} {subject.precision}"),
        ("Texts", f"{texts}, {subject.canaries} canaries"),
        ("Right", f"cosine of at least {subject.floor} with the vector in process, or the reference's for canaries"),
        ("Load", load),
        ("Run", f"{report.started}, {run}, seed {settings.seed}"),
    ]


def _caveats(report: SoakReport) -> str:
    observed = report.observed
    notes = ["Generator and server share the machine's cores; there is no network between them."]
    if observed.load_s:
        notes.append(f"The generator took {100 * observed.cpu_s / observed.load_s:.0f} % of one core.")
    late = [window.lag_p99_ms for window in observed.windows if window.lag_p99_ms is not None]
    if over := sum(value > LATE_MS for value in late):
        notes.append(
            f"**In {over} of {len(late)} windows the generator sent requests more than {LATE_MS:.0f} ms late at p99 "
            f"(worst {max(late):.0f} ms): the times there include that.**"
        )
    if report.host.load_1min_start > 0.5:
        notes.append("**The machine was busy before the start: absolute times are not reliable.**")
    return " ".join(notes)


def _memory(observed: Observations) -> list[tuple[str, ...]]:
    first, last, slopes = observed.memory[0].resident_mb, observed.memory[-1].resident_mb, growth(observed.memory)
    return [
        (
            name,
            f"{first[name]:.1f}" if name in first else NONE,
            f"{end:.1f}",
            f"{slopes[name]:+.1f}" if name in slopes else NONE,
        )
        for name, end in sorted(last.items(), key=lambda item: item[0] == ALL)
    ]


def _draw(report: SoakReport, path: Path) -> None:
    """Draw memory by process, with the half that the slope is fitted to, above p50 and p99 of each window."""
    figure = Figure(figsize=(9, 6), layout="constrained", facecolor=LIGHT.paper)
    above, below = figure.subplots(2, 1, sharex=True)
    title = f"Soak of {report.subject.name} (shaded: the half that the slope is fitted to)"
    for axes, label in ((above, "resident memory, MB"), (below, "milliseconds to a right answer")):
        axes.set_prop_cycle(color=LIGHT.series)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, color=LIGHT.muted)
        axes.set_axisbelow(True)
        axes.set_ylabel(label)
    above.set_title(title, loc="left")
    below.set_xlabel("minutes of load")
    samples, windows = report.observed.memory, report.observed.windows
    if samples:
        minutes = [sample.at_s / 60 for sample in samples]
        for name in samples[-1].resident_mb:
            colour = {"color": LIGHT.ink} if name == ALL else {}
            above.plot(minutes, [sample.resident_mb.get(name, 0.0) for sample in samples], label=name, **colour)
        half = second_half(samples)
        above.axvspan(half[0].at_s / 60, half[-1].at_s / 60, color=LIGHT.muted, alpha=0.12, linewidth=0)
    for name in ("p99_ms", "p50_ms"):
        points = [(window.at_s / 60, value) for window in windows if (value := getattr(window, name)) is not None]
        below.plot([at for at, _ in points], [value for _, value in points], label=name.removesuffix("_ms"))
    if unexpected := [window.at_s / 60 for window in windows if window.unexpected]:
        label = "unexpected\nends"
        below.plot(unexpected, [0.0] * len(unexpected), "x", color=LIGHT.ink, label=label, clip_on=False)
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        if axes.get_lines():
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, format="png")
