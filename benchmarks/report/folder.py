"""A report's folder: report.json, report.md and plots, written whole or not at all, and the headline of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report.document import Image, build_document, status
from benchmarks.report.plots import draw_plots
from benchmarks.report.record import PEOPLE, SCHEMA_VERSION
from benchmarks.report.storage import REPORT_FILE, Report, write_report
from benchmarks.report.tables import Grid, table_lines
from mirror_runtime.errors import InputError
from mirror_runtime.folders import whole_folder

MARKDOWN_FILE = "report.md"


def check_output(folder: Path) -> None:
    """Refuse, before anything is measured, a folder that has something other than a report.

    Raises:
        InputError: it has, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file: choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT_FILE).is_file():
        raise InputError(f"--output {folder} is not empty and has no report to replace: choose another folder")


def write_folder(report: Report, folder: Path) -> None:
    """Write the report's files; an older report there is replaced when the new one is complete.

    Raises:
        InputError: the folder cannot be written.
    """
    check_output(folder)
    with whole_folder(folder, overwrite=True, marker=REPORT_FILE) as partial:
        plots = draw_plots(report, partial)
        (partial / MARKDOWN_FILE).write_text(render_markdown(report, plots), encoding="utf-8")
        write_report(report, partial / REPORT_FILE)


def render_markdown(report: Report, plots: Mapping[str, str]) -> str:
    """Render a report; `plots` maps the name of each plot that was drawn to the file beside it."""
    parts = [f"# Benchmark of {report.facts.subject.name}", status(report)]
    for part in build_document(report):
        parts.append(f"## {part.title}")
        for block in part.blocks:
            if isinstance(block, Grid):
                parts.append(table_lines(block.head, block.rows))
            elif isinstance(block, Image):
                parts.append(f"![{block.caption}]({plots[block.name]})" if block.name in plots else "")
            else:
                parts.append(block)
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(report: Report, folder: Path) -> dict[str, Any]:
    """Return every measurement's median, for the one JSON line that ends standard output."""
    facts = report.facts
    return {
        "report": str(folder / REPORT_FILE),
        "schema_version": SCHEMA_VERSION,
        "partial": facts.partial,
        "fingerprint": facts.subject.fingerprint,
        "cpu": facts.host.cpu_model,
        "cores_usable": facts.host.cores_usable,
        "figures": [
            {
                "suite": one.suite,
                "party": one.party,
                "conditions": dict(one.conditions),
                "metric": one.metric,
                "unit": one.unit,
                "median": one.median,
            }
            for one in report.measurements
            if one.party != PEOPLE
        ],
        "failures": len(report.failures),
    }
