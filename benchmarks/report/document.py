"""A report for people: sections of text, tables and plots, as report.md beside report.json, and a run's headline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.plan import Suite
from benchmarks.report.plots import PLOTS, draw, drawable
from benchmarks.report.record import PEOPLE, SCHEMA_VERSION
from benchmarks.report.sections import PLOTS_OF, TABLES, TITLES
from benchmarks.report.storage import REPORT_FILE, Report, write_report
from benchmarks.report.tables import Grid, build_grid, table_lines
from mirror_runtime.errors import InputError
from mirror_runtime.folders import whole_folder

MARKDOWN_FILE = "report.md"
DPI = 80  # of the plots beside it

STEADY = 0.15
"""Relative distance of the slowest and the fastest round of the same work from which on the report warns."""

ROUND_METRICS = ("texts per second", "time to the first vector")
"""Metrics with one sample per round of the same work."""

PARTIAL = (
    "**Partial: the run was interrupted.** What is here was measured, some of it in fewer rounds than requested; what "
    "is missing was not."
)
"""Must be read before any figure."""


@dataclass(frozen=True)
class Image:
    """A plot, by its name in `plots.PLOTS`."""

    name: str
    caption: str


Block: TypeAlias = "str | Grid | Image"
"""Text with `code` and **emphasis**, a table or a plot."""

Part: TypeAlias = tuple[str, list[Block]]
"""A title and what is below it."""


def check_output(folder: Path) -> None:
    """Refuse, before anything is measured, a folder that has something other than a report."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file: choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT_FILE).is_file():
        raise InputError(f"--output {folder} is not empty and has no report to replace: choose another folder")


def write_folder(report: Report, folder: Path) -> None:
    """Write report.json, report.md and plots; an older report there is replaced when the new one is complete."""
    with whole_folder(folder, overwrite=True, marker=REPORT_FILE) as partial:
        for name in drawable(report):
            draw(name, report).savefig(partial / f"{name}.png", dpi=DPI)
        (partial / MARKDOWN_FILE).write_text(render_markdown(report), encoding="utf-8")
        write_report(report, partial / REPORT_FILE)


def render_markdown(report: Report) -> str:
    """Render a report that has its plots beside it."""
    parts = [f"# Benchmark of {report.facts.subject.name}", *([PARTIAL] if report.facts.partial else [])]
    for title, blocks in build_document(report):
        parts.append(f"## {title}")
        for block in blocks:
            if isinstance(block, Grid):
                parts.append(table_lines(block.head, block.rows))
            else:
                parts.append(f"![{block.caption}]({block.name}.png)" if isinstance(block, Image) else block)
    return "\n\n".join(parts) + "\n"


def headline(report: Report, folder: Path) -> dict[str, Any]:
    """Return every measurement's median, for the one JSON line that ends standard output."""
    facts = report.facts
    names = ("suite", "party", "conditions", "metric", "unit")
    return {
        "report": str(folder / REPORT_FILE),
        "schema_version": SCHEMA_VERSION,
        "partial": facts.partial,
        "fingerprint": facts.subject.fingerprint,
        "cpu": facts.host.cpu_model,
        "cores_usable": facts.host.cores_usable,
        "figures": [
            {name: getattr(one, name) for name in names} | {"median": one.median}
            for one in report.measurements
            if one.party != PEOPLE
        ],
        "failures": len(report.failures),
    }


def build_document(report: Report) -> list[Part]:
    """Return the sections that the report has content for, conditions first and limits last."""
    drawn = drawable(report)
    parts = [_conditions(report)]
    for suite, tables in TABLES.items():
        found = [(build_grid(report, suite, table), table.text) for table in tables]
        blocks: list[Block] = [block for grid, text in found if grid is not None for block in (grid, text) if block]
        if blocks:
            blocks += [Image(name, PLOTS[name].caption) for name in PLOTS_OF.get(suite, ()) if name in drawn]
            parts.append((TITLES.get(suite, suite.capitalize()), blocks))
    return [*parts, _limits(report)]


def unsteady_parties(report: Report) -> list[str]:
    """Name the parties whose rounds, each the same work, differ by more than `STEADY`."""
    rounds = [one for one in report.measurements if one.metric in ROUND_METRICS and one.suite != "serving"]
    return [f"{one.party} ({one.suite})" for one in rounds if one.figure("max") > (1 + STEADY) * one.figure("min")]


def _conditions(report: Report) -> Part:
    facts = report.facts
    host, work, subject, source, settings = facts.host, facts.workload, facts.subject, facts.source, facts.settings
    variables = ", ".join(f"`{name}={value}`" for name, value in host.thread_environment.items())
    clocks = "not stated by the system"
    if host.clocks_mhz:
        spread = dict.fromkeys(f"{one(host.clocks_mhz):,.0f}" for one in (min, max))
        clocks = f"{' to '.join(spread)} MHz before the first measurement"
    cores = ", ".join(map(str, host.affinity)) or "any"
    quota = "no CPU quota" if host.cpu_quota_cores is None else f"CPU quota of {host.cpu_quota_cores:g} cores"
    limit = host.memory_limit_bytes
    memory = "no memory limit" if limit is None else f"memory limit of {limit / 2**30:.1f} GiB"
    rows = {
        "Machine": f"{host.cpu_model}, {host.cores_usable} of {host.cores_online} logical cores usable",
        "CPU features": ", ".join(host.cpu_flags),
        "Clocks": f"{clocks}; governor: {host.governor or 'not stated by the system'}",
        "Memory": f"{host.memory_bytes / 2**30:.1f} GiB",
        "Limits of the process": f"logical cores {cores}; {quota}; {memory}",
        "Variables that change threads": variables or "none set",
        "System": f"{host.os}, Python {host.python}",
        "Load average before": f"{host.load_1min_start:.2f} (1 min)",
        "Versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        "Commit": source.commit and source.commit[:12] + " with local changes" * bool(source.dirty),
        "Bundle": f"{subject.name}, fingerprint `{subject.fingerprint}`, from {subject.base_model}, "
        f"{subject.dim} dimensions, up to {subject.max_tokens} tokens",
        "Workload": f"{work.texts} texts ({work.source}), {work.distinct} of them distinct; tokens: mean "
        f"{work.tokens_mean:.1f}, p50 {work.tokens_p50:.0f}, p90 {work.tokens_p90:.0f}, max {work.tokens_max}; "
        f"{work.truncated} truncated; sha256 `{work.texts_sha256[:16]}`",
        "Tuning": settings.training,
        "Run": f"{facts.started}, {facts.wall_s:.0f} s, suites {', '.join(settings.suites)}, {settings.rounds} rounds, "
        f"seed {settings.seed}{', quick' * settings.quick}"
        + "".join(f"; interrupted, continued {moment}" for moment in facts.resumed),
    }
    text = "Every party runs with its default threads, which may use all usable cores."
    if host.load_1min_start > 0.5:
        text += (
            f" **The machine was busy before the first measurement (load average {host.load_1min_start:.2f}): compare "
            "parties within this report, and trust no absolute figure.**"
        )
    if unsteady := unsteady_parties(report):
        text += (
            f" **The machine was not steady: the slowest and fastest rounds of {', '.join(unsteady)} are more than "
            f"{100 * STEADY:.0f} % apart. Medians and intervals include that; measure again on a quiet machine before "
            "small differences count.**"
        )
    if settings.quick:
        text += " A quick run has few samples: use it to check that everything works, not to decide."
    return "Conditions", [Grid((), [(name, value) for name, value in rows.items() if value]), text]


def _limits(report: Report) -> Part:
    """List what was not measured, and why."""
    settings = report.facts.settings
    rows = [(one.suite, one.party, one.reason.replace("\n", " ")) for one in report.failures]
    rows += [(suite.value, "all", "not requested") for suite in Suite if suite.value not in settings.suites]
    left_out = [name for name in report.facts.subject.artifacts if name not in settings.variants]
    rows += [("all", name, "left out by --engine or --precision") for name in left_out]
    note = (
        "One machine, one bundle, one workload: other processors, text lengths and encoders may order parties "
        "differently. Clocks were not fixed and threads not swept: every party ran with its defaults."
    )
    grids = [Grid(("suite", "party", "why it was not measured"), rows)] if rows else []
    return "Limits", [*grids, note]
