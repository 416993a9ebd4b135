"""A report for people: sections of text, tables and plots, as report.md beside report.json, and a run's headline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, StrictUndefined

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


_CONDITIONS = Environment(trim_blocks=True, undefined=StrictUndefined).from_string(
    Path(__file__).with_name("conditions.jinja").read_text(encoding="utf-8")
)


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
    """Fill conditions.jinja: a line "name: value" for each row of the table, then what is to be said below it."""
    rendered = _CONDITIONS.render(
        facts=report.facts, unsteady=unsteady_parties(report), steady=STEADY, **vars(report.facts)
    )  # fmt: skip
    lines, _, text = rendered.partition("\n\n")
    pairs = (line.split(": ", 1) for line in lines.splitlines())
    return "Conditions", [Grid((), [(name, value) for name, value in pairs if value]), " ".join(text.split())]


def _limits(report: Report) -> Part:
    """List what was not measured, and why."""
    settings = report.facts.settings
    rows = [(one.suite, one.party, one.reason.replace("\n", " ")) for one in report.failures]
    if report.facts.subject.fingerprint:  # a bundle's, which has suites
        rows += [(suite.value, "all", "not requested") for suite in Suite if suite.value not in settings.suites]
    left_out = [name for name in report.facts.subject.artifacts if name not in settings.variants]
    rows += [("all", name, "left out by --engine or --precision") for name in left_out]
    note = (
        "One machine, one bundle, one workload: other processors, text lengths and encoders may order parties "
        "differently. Clocks were not fixed and threads not swept: every party ran with its defaults."
    )
    grids = [Grid(("suite", "party", "why it was not measured"), rows)] if rows else []
    return "Limits", [*grids, note]
