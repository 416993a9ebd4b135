"""One generic way from measurements to tables: a table is described by its row keys and its columns, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

from benchmarks.report.record import Condition, Measurement
from benchmarks.report.storage import Report

NONE = "–"
PARTY = "party"


@dataclass(frozen=True)
class Column:
    """One column, or with `spread` one for each value of a condition or "party", which stands for "{value}" in `head`.

    Attributes:
        figure: of `Measurement.figure`, or "count", "range" (lowest to highest), "interval", "signed interval", "yes".
        form: format specification, or "percent".
        over: metric of the same row whose median divides the figure.
        where: conditions that the measurement must have beside those of the row.
        suite: of the measurement where it is another one: it is then looked up by its party alone.
    """

    head: str
    metric: str
    figure: str = "p50"
    form: str = ",.0f"
    _: KW_ONLY
    over: str = ""
    scale: float = 1.0
    where: Mapping[str, Condition] = field(default_factory=dict)
    suite: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Table:
    """A row for each combination of "party" and the conditions named in `rows`, where the first column has a figure.

    Measurements have the conditions `where`; the text below has caption and caveats.
    """

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    text: str = ""
    where: Mapping[str, Condition] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A table's cells under a head; an empty head is a list of names and values."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def build_grid(report: Report, suite: str, table: Table) -> Grid | None:
    """Fill a table from a report; None where no row has a figure. Columns that are empty are left out."""
    columns = [one for column in table.columns for one in _spread(report, suite, table, column)]
    first, named = table.columns[0], set(table.rows) - {PARTY}
    keys = {
        tuple(one.attributes.get(name) for name in table.rows): None
        for one in report.select(suite, first.metric, **{**table.where, **first.where})
        if not named or named & one.conditions.keys()
    }
    found = [dict(zip(table.rows, key, strict=True)) for key in keys]
    rows = [
        [*map(_value, row.values()), *(_cell(report, suite, table, row, column) for column in columns)] for row in found
    ]
    heads = [*table.rows, *(column.head for column in columns)]
    shown = [at for at in range(len(heads)) if any(row[at] != NONE for row in rows)]
    return Grid([heads[at] for at in shown], [[row[at] for at in shown] for row in rows]) if rows else None


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; an empty head stays empty."""
    columns = len(head or rows[0])
    lines = [head or [""] * columns, ["---"] * columns, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def figure_text(measurement: Measurement, figure: str, form: str, scale: float = 1.0) -> str:
    """Write a figure of a measurement; see `Column`."""

    def number(name: str, sign: str = "") -> str:
        value = scale * measurement.figure(name)
        text = f"{100 * value:.0f} %" if form == "percent" else f"{value:{sign}{form}}"
        return text if any(digit in text for digit in "123456789") else text.strip("+-")

    if figure == "count":
        return f"{measurement.total:,}"
    if figure == "yes":
        return "yes" if measurement.median else "no"
    if figure == "range":
        return f"{number('min')} to {number('max')}"
    if figure.endswith("interval"):
        middle, low, high = (number(name, "+" * figure.startswith("signed")) for name in ("p50", "low", "high"))
        return f"{middle} ({low} to {high})"
    return number(figure)


def _cell(report: Report, suite: str, table: Table, row: Mapping[str, Condition | None], column: Column) -> str:
    """Write a figure: of several measurements that match, that of the one with the fewest other conditions."""
    fixed = {PARTY: row.get(PARTY)} if column.suite else {**row, **table.where}
    wanted = {name: value for name, value in {**fixed, **column.where}.items() if value is not None}

    def find(metric: str) -> Measurement | None:
        matching = report.select(column.suite or suite, metric, **wanted)
        return min(matching, key=lambda one: len(one.conditions), default=None)

    found, divisor = find(column.metric), find(column.over) if column.over else None
    if found is None or (column.over and (divisor is None or not divisor.median)):
        return NONE
    return figure_text(found, column.figure, column.form, column.scale / (divisor.median if divisor else 1.0))


def _spread(report: Report, suite: str, table: Table, column: Column) -> Iterable[Column]:
    """Return a column for each value of its `spread`."""
    if not column.spread:
        return [column]
    found = report.select(suite, column.metric, **{**table.where, **column.where})
    values = {one.attributes[column.spread]: None for one in found if column.spread in one.attributes}
    plain = replace(column, spread="")
    return [
        replace(plain, head=column.head.format(value=_value(value)), where={**column.where, column.spread: value})
        for value in values
    ]


def _value(value: Condition | None) -> str:
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value
