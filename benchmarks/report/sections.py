"""What a report shows of each suite, as data: the tables of tables.json, their captions in captions.md, and plots.

A suite's tables are a list in tables.json. A table has its `rows`, `where` and `columns` as `tables.Table` has them, a
column being [head, metric, figure, form, {others of tables.Column}]: what is left out at the end has its default, and a
metric alone is its own head. Its `caption` is the heading "suite: caption" of captions.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.tables import Column, Table

FOLDER = Path(__file__).resolve().parent

TITLES = {"latency": "Latency of one text", "gpu": "Ways to run an encoder on this GPU"}
"""Of the sections that have other titles than their suites."""

PLOTS_OF: Mapping[str, tuple[str, ...]] = {
    "throughput": ("throughput", "lengths"),
    "latency": ("latency",),
    "quality": ("pareto",),
    "serving": ("serving",),
}
"""Names of `plots.PLOTS` below a suite's tables."""


def read_tables() -> dict[str, tuple[Table, ...]]:
    """Read the tables of each suite, in the order of a report's sections."""
    markdown = (FOLDER / "captions.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (.+)\n\n((?:.+\n)+)", markdown, re.MULTILINE)
    captions = {heading: " ".join(text.split()) for heading, text in found}

    def table(suite: str, data: Mapping[str, Any]) -> Table:
        caption = captions[f"{suite}: {data['caption']}"] if "caption" in data else ""
        return Table(tuple(data["rows"]), tuple(map(_column, data["columns"])), caption, data.get("where", {}))

    suites = json.loads((FOLDER / "tables.json").read_text(encoding="utf-8"))
    return {suite: tuple(table(suite, data) for data in tables) for suite, tables in suites.items()}


def _column(parts: Sequence[Any]) -> Column:
    *plain, last = parts
    others: Mapping[str, Any] = last if isinstance(last, dict) else {}
    head, *rest = plain if others else parts
    return Column(head, *(rest or [head]), **others)


TABLES = read_tables()
