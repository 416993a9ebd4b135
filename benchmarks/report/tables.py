"""One generic way from measurements to tables: a table is described by its row keys and its columns, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TypeAlias

from benchmarks.report.record import Condition, Measurement
from benchmarks.report.storage import Report

NONE = "–"
PARTY = "party"

Key: TypeAlias = tuple["Condition | None", ...]


@dataclass(frozen=True)
class Column:
    """One column, or with `spread` one for each value of a condition.

    Attributes:
        head: of the column; "{value}" in it stands for the value of `spread`.
        metric: whose figure is shown.
        figure: of `Measurement.figure`, or "count", "range" (lowest to highest), "interval", "signed interval", "yes".
        over: metric of the same row whose median divides the figure.
        scale: multiplies the figure.
        form: format specification, or "percent".
        where: conditions that the measurement must have beside those of the row.
        suite: of the measurement where it is another one: it is then looked up by its party alone.
        spread: "party" or a condition.
    """

    head: str
    metric: str
    _: KW_ONLY
    figure: str = "p50"
    over: str = ""
    scale: float = 1.0
    form: str = ",.0f"
    where: Mapping[str, Condition] = field(default_factory=dict)
    suite: str = ""
    spread: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table's description: a row for each combination of the row keys' values, in the order measured.

    Attributes:
        rows: "party" or names of conditions: the first columns.
        columns: the others; a row exists where the first of them has a figure.
        where: conditions of the measurements.
        text: caption and caveats, below the table.
    """

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    where: Mapping[str, Condition] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Grid:
    """A table's cells under a head; an empty head is a list of names and values."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def build_grid(report: Report, suite: str, table: Table) -> Grid | None:
    """Fill a table from a report; None where no row has a figure. Columns without any figure are left out."""
    columns = [one for column in table.columns for one in _spread(report, suite, column, table)]
    first = table.columns[0]
    keys = list(
        dict.fromkeys(
            _key(one, table.rows)
            for one in report.select(first.suite or suite, first.metric)
            if _has(one, {**table.where, **first.where}) and _has_keys(one, table.rows)
        )
    )
    cells = [[_cell(report, suite, table, key, column) for column in columns] for key in keys]
    shown = [at for at in range(len(columns)) if any(row[at] != NONE for row in cells)]
    heads = [name for at, name in enumerate(table.rows) if any(key[at] is not None for key in keys)]
    rows = [
        [
            *(_value(value) for name, value in zip(table.rows, key, strict=True) if name in heads),
            *(row[at] for at in shown),
        ]
        for key, row in zip(keys, cells, strict=True)
    ]
    return Grid((*heads, *(columns[at].head for at in shown)), rows) if rows and shown else None


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; an empty head stays empty."""
    columns = len(head or rows[0])
    lines = [head or [""] * columns, ["---"] * columns, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def attributes(measurement: Measurement) -> dict[str, Condition]:
    """Return a measurement's conditions, its party among them."""
    return {PARTY: measurement.party, **measurement.conditions}


def _find(report: Report, suite: str, table: Table, key: Key, column: Column, metric: str) -> Measurement | None:
    """Find the measurement of a cell: of several that match, the one with the fewest other conditions."""
    rows: dict[str, Condition | None] = dict(zip(table.rows, key, strict=True))
    wanted = {PARTY: rows.get(PARTY)} if column.suite else {**rows, **table.where}
    matching = (one for one in report.select(column.suite or suite, metric) if _has(one, {**wanted, **column.where}))
    return min(matching, key=lambda one: len(one.conditions), default=None)


def _cell(report: Report, suite: str, table: Table, key: Key, column: Column) -> str:
    measurement = _find(report, suite, table, key, column, column.metric)
    divisor = _find(report, suite, table, key, column, column.over) if column.over else None
    if measurement is None or (column.over and (divisor is None or not divisor.median)):
        return NONE
    return figure_text(
        measurement, column.figure, column.form, column.scale / (1.0 if divisor is None else divisor.median)
    )


def figure_text(measurement: Measurement, figure: str, form: str, scale: float = 1.0) -> str:
    """Write a figure of a measurement; see `Column`."""

    def number(name: str, form: str = form) -> str:
        value = scale * measurement.figure(name)
        if form == "percent":
            return f"{100 * value:.0f} %"
        text = f"{value:{form}}"
        return text if any(digit in text for digit in "123456789") else text.replace("-", "").replace("+", "")

    if figure == "count":
        return f"{measurement.total:,}"
    if figure == "yes":
        return "yes" if measurement.median else "no"
    if figure == "range":
        return f"{number('min')} to {number('max')}"
    if figure in ("interval", "signed interval"):
        form = f"+{form}" if figure.startswith("signed") else form
        return f"{number('p50', form)} ({number('low', form)} to {number('high', form)})"
    return number(figure)


def _spread(report: Report, suite: str, column: Column, table: Table) -> Iterable[Column]:
    """Return a column for each value of its `spread`."""
    if not column.spread:
        return [column]
    wanted = {**table.where, **column.where}
    values = dict.fromkeys(
        attributes(one).get(column.spread) for one in report.select(suite, column.metric) if _has(one, wanted)
    )
    return [
        replace(
            column, spread="", head=column.head.format(value=_value(value)),
            where={**column.where, column.spread: value},
        )
        for value in values
        if value is not None
    ]  # fmt: skip


def _key(measurement: Measurement, rows: Sequence[str]) -> Key:
    known = attributes(measurement)
    return tuple(known.get(name) for name in rows)


def _has_keys(measurement: Measurement, rows: Sequence[str]) -> bool:
    """Return whether a measurement belongs to a table: it has a condition of the row keys, where these name any."""
    conditions = [name for name in rows if name != PARTY]
    return not conditions or any(name in measurement.conditions for name in conditions)


def _has(measurement: Measurement, wanted: Mapping[str, Condition | None]) -> bool:
    known = attributes(measurement)
    return all(known.get(name) == value for name, value in wanted.items() if value is not None)


def _value(value: Condition | None) -> str:
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value
