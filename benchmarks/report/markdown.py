"""A report as Markdown, for pull requests and terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.report.document import Image, build_document, status
from benchmarks.report.storage import Report
from benchmarks.report.tables import Grid


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


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; an empty head stays empty."""
    columns = len(head or rows[0])
    lines = [head or [""] * columns, ["---"] * columns, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
