"""What a section of a report is made of, and how figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality_results import Estimate
from benchmarks.summary import median

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; an empty head is a list of names and values."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A drawing, by the name it has in `benchmarks.plots`."""

    name: str
    caption: str


Block = str | Table | Plot
"""Text with `code` and **emphasis**, a table or a drawing."""


@dataclass(frozen=True)
class Section:
    """A title and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


def cosine_text(value: float) -> str:
    """Write a cosine with the digits that tell artifacts apart."""
    return f"{value:.6f}"


def percent(share: float | None) -> str:
    """Write a share."""
    return NONE if share is None else f"{100 * share:.0f} %"


def median_and_spread(values: Sequence[float]) -> str:
    """Write a median with its lowest and highest value."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def estimate_text(figure: Estimate | None, *, signed: bool = False) -> str:
    """Write a figure with its interval."""
    if figure is None:
        return NONE
    value, low, high = (
        f"{round(number, 2) + 0.0:{'+' if signed else ''}.2f}" for number in (figure.value, figure.low, figure.high)
    )  # adding zero takes the sign from a rounded-off minus
    return f"{value} ({low} to {high})"
