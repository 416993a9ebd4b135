"""A report as Markdown, for pull requests and terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.blocks import Plot, Section, Table
from benchmarks.results import Report
from benchmarks.sections import sections, status


def render_markdown(report: Report, plots: Mapping[str, str]) -> str:
    """Render a report; `plots` gives the file beside it for each drawing that was made."""
    parts = [f"# Benchmark of {report.subject.name}", status(report)]
    for section in sections(report):
        parts += [f"## {section.title}", *_blocks(section, plots)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _blocks(section: Section, plots: Mapping[str, str]) -> list[str]:
    texts = []
    for block in section.blocks:
        if isinstance(block, Table):
            texts.append(table_lines(block.head, block.rows))
        elif isinstance(block, Plot):
            texts.append(f"![{block.caption}]({plots[block.name]})" if block.name in plots else "")
        else:
            texts.append(block)
    return texts


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; an empty head stays empty."""
    columns = len(head or rows[0])
    lines = [head or [""] * columns, ["---"] * columns, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
