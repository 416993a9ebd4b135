"""A soak's report as files: soak.json, soak.md for people, and soak.png with memory and p99 over time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.blocks import NONE
from benchmarks.markdown import table_lines
from benchmarks.plots import LIGHT
from benchmarks.soak_figures import ALL, by_name, second_half
from benchmarks.soak_results import SOAK_FILE, SoakReport, Times
from benchmarks.soak_tally import EXPECTED
from mirror_runtime.bundle import write_json

MARKDOWN_FILE = "soak.md"
PLOT_FILE = "soak.png"

LATE_MS = 20.0
"""Sent later than this at p99, requests waited for the generator, and their times say so."""

_SAID_LINES = 20


def write_files(report: SoakReport, folder: Path) -> None:
    """Write a report's three files into a folder."""
    _draw(report, folder / PLOT_FILE)
    (folder / MARKDOWN_FILE).write_text(render(report), encoding="utf-8")
    write_json(report, folder / SOAK_FILE)


def headline(report: SoakReport, output: Path) -> str:
    """Give the one line of JSON that ends standard output."""
    line = {
        "report": str(output / SOAK_FILE),
        "schema_version": report.schema_version,
        "partial": report.partial,
        "passed": report.passed,
        "load_s": round(report.load_s, 1),
        "requests": sum(report.outcomes.values()),
        "unexpected": sum(problem.count for problem in report.problems),
        "p99_ms": None if report.times is None else report.times.p99_ms,
        "p99_drift": report.p99_drift,
        "growth_mb_per_hour": report.growth_mb_per_hour.get(ALL),
    }
    return json.dumps(line, allow_nan=False)


def render(report: SoakReport) -> str:
    """Write the report for people."""
    verdict = "within its thresholds" if report.passed else "beyond its thresholds"
    parts = [f"# Soak of {report.subject.name}: {verdict}"]
    if report.partial:
        parts.append("**Partial: the run was interrupted.** What is here was measured, over less time than asked for.")
    parts += [
        table_lines(
            ("what", "verdict", "found (threshold)"), [(v.name, _word(v.passed), v.says) for v in report.verdicts]
        ),
        f"![Memory and p99 over time]({PLOT_FILE})",
        "## Conditions",
        table_lines((), _conditions(report)),
        *_caveats(report),
        "## Times of right answers",
        "From the moment a request was due to its checked answer; the kind is protocol and texts a request.",
        table_lines(
            ("kind", "requests", "p50 ms", "p99 ms", "p99.9 ms"),
            [_times("all", report.times), *(_times(kind, report.times_by_kind[kind]) for kind in _kinds(report))],
        ),
        "## How requests ended",
        table_lines(("end", "requests", "expected"), _ends(report)),
    ]
    if report.problems:
        rows = [(p.kind, str(p.count), f"{p.first_at_s:.1f}", _line(p.first_reason)) for p in report.problems]
        parts += ["## Unexpected", table_lines(("kind", "requests", "first at s", "what was said first"), rows)]
    if report.memory:
        parts += ["## Resident memory", table_lines(("process", "begin MB", "end MB", "MB/hour"), _memory(report))]
    if report.server_said:
        lines = report.server_said[-_SAID_LINES:]
        parts += ["## What the server said", "```\n" + "\n".join(lines) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _word(passed: bool | None) -> str:
    return {True: "passed", False: "**FAILED**", None: "not judged"}[passed]


def _conditions(report: SoakReport) -> list[tuple[str, str]]:
    host, subject, work, settings = report.host, report.subject, report.workload, report.settings
    commit = NONE
    if report.source.commit is not None:
        commit = report.source.commit[:12] + (" with local changes" if report.source.dirty else "")
    load = NONE
    if report.capacity_per_s is not None:
        load = (
            f"{report.offered_per_s:.1f} requests a second at random (Poisson): {settings.share:g} of the "
            f"{report.capacity_per_s:.1f} that a closed loop of the same mix was answered on the same cores"
        )
    return [
        ("Machine", f"{host.cpu_model}, {host.cores_usable} of {host.cores_online} logical cores usable"),
        ("System", f"{host.os}, Python {host.python}"),
        ("Load average before", f"{host.load_1min_start:.2f} (1 min)"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("Commit", commit),
        ("Bundle", f"{subject.name}, fingerprint `{subject.fingerprint}`, {subject.engine} {subject.precision}"),
        (
            "Texts",
            f"{work.texts} ({work.source}; mean {work.tokens_mean:.1f} tokens), {subject.long_texts} long ones, "
            f"{subject.canaries} canaries",
        ),
        (
            "Right",
            f"cosine of at least {subject.floor} with the vector in process; with the reference's own for canaries",
        ),
        ("Load", load),
        (
            "Run",
            f"{report.started}, load for {report.load_s:.0f} s of {60 * settings.minutes:.0f} s, windows of "
            f"{settings.window_s:g} s, seed {settings.seed}",
        ),
    ]


def _caveats(report: SoakReport) -> list[str]:
    notes = ["Generator and server share the machine's cores; there is no network between them."]
    if report.generator_cpu_share is not None:
        notes.append(f"The generator took {100 * report.generator_cpu_share:.0f} % of one core.")
    late = [w.sent_late_p99_ms for w in report.windows if w.sent_late_p99_ms is not None]
    if late and max(late) > LATE_MS:
        over = sum(value > LATE_MS for value in late)
        notes.append(
            f"**In {over} of {len(late)} windows the generator sent requests more than {LATE_MS:.0f} ms late at p99 "
            f"(worst {max(late):.0f} ms): the times there are its own, too.**"
        )
    if report.host.load_1min_start > 0.5:
        notes.append("**The machine was busy before the start: trust no absolute time.**")
    return [" ".join(notes)]


def _kinds(report: SoakReport) -> list[str]:
    """Give the kinds of requests by protocol, then by texts as numbers."""
    return sorted(report.times_by_kind, key=lambda kind: (kind.split()[0], int(kind.split()[1])))


def _times(kind: str, times: Times | None) -> tuple[str, ...]:
    if times is None:
        return (kind, "0", NONE, NONE, NONE)
    return (kind, f"{times.requests:,}", f"{times.p50_ms:.1f}", f"{times.p99_ms:.1f}", f"{times.p999_ms:.1f}")


def _ends(report: SoakReport) -> list[tuple[str, ...]]:
    expected = {outcome.value for outcome in EXPECTED}
    ends = sorted(report.outcomes.items(), key=lambda end: -end[1])
    return [(name, f"{count:,}", "yes" if name in expected else "**no**") for name, count in ends] or [
        (NONE, "0", NONE)
    ]


def _memory(report: SoakReport) -> list[tuple[str, ...]]:
    first, last = report.memory[0], report.memory[-1]
    begins, ends = by_name(first) | {ALL: first.total_mb}, by_name(last) | {ALL: last.total_mb}
    rows: list[tuple[str, ...]] = []
    for name, end in ends.items():
        growth = report.growth_mb_per_hour.get(name)
        begin = begins.get(name)
        rows.append(
            (
                name,
                NONE if begin is None else f"{begin:.1f}",
                f"{end:.1f}",
                NONE if growth is None else f"{growth:+.1f}",
            )
        )
    return rows


def _line(text: str) -> str:
    return " ".join(text.split())


def _draw(report: SoakReport, path: Path) -> None:
    """Draw memory by process, with the half that its slope is of, above p50 and p99 of each window."""
    figure = Figure(figsize=(9, 6), layout="constrained", facecolor=LIGHT.paper)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes in (above, below):
        axes.set_prop_cycle(color=LIGHT.series)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, color=LIGHT.muted)
        axes.set_axisbelow(True)
    _draw_memory(above, report)
    windows = [(window.at_s / 60, window.times) for window in report.windows if window.times is not None]
    for label, values in (
        ("p99", [times.p99_ms for _, times in windows]),
        ("p50", [times.p50_ms for _, times in windows]),
    ):
        below.plot([at for at, _ in windows], values, label=label)
    wrong = [window.at_s / 60 for window in report.windows if _unexpected(window.outcomes)]
    if wrong:
        below.plot(wrong, [0.0] * len(wrong), "x", color=LIGHT.ink, label="unexpected\nends", clip_on=False)
    below.set_ylim(bottom=0)
    below.set_xlabel("minutes of load")
    below.set_ylabel("milliseconds to a right answer")
    for axes in (above, below):
        if axes.get_lines():
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, format="png")


def _draw_memory(axes: Any, report: SoakReport) -> None:
    axes.set_title(f"Soak of {report.subject.name} (shaded: the half that the slope is fitted to)", loc="left")
    axes.set_ylabel("resident memory, MB")
    minutes = [sample.at_s / 60 for sample in report.memory]
    names = by_name(report.memory[-1]) if report.memory else {}
    for name in names:
        axes.plot(minutes, [by_name(sample).get(name, 0.0) for sample in report.memory], label=name)
    if names:
        axes.plot(minutes, [sample.total_mb for sample in report.memory], color=LIGHT.ink, label=ALL)
        half = second_half(report.memory)
        axes.axvspan(half[0].at_s / 60, half[-1].at_s / 60, color=LIGHT.muted, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)


def _unexpected(outcomes: Iterable[str]) -> bool:
    return bool(set(outcomes) - {outcome.value for outcome in EXPECTED})
