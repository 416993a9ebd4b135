"""The front of speed and quality, and the choice of one point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.tradeoff.measure import Figure, Point, Quality, Speed
from mirror_runtime.errors import InputError

HEAD = ("candidate", "texts/s", "×", "p50 ms", "loses most of", "change")
"""Over `Row.shown`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A point with everything that was measured on it."""

    point: Point
    quality: Quality
    speed: Speed
    ratio: float  # of its rate to that of the encoder's fastest precision

    @property
    def worst(self) -> Figure:
        """The figure that loses most: others may rise where vectors become worse (docs/log.md)."""
        return min(self.quality.results, key=lambda one: one.gain)

    @property
    def lost(self) -> str:
        """What that figure is called."""
        metric = self.worst.metric.partition(",")[0]
        return metric if self.worst.task == "probe" else f"{self.worst.set} {metric}"

    @property
    def loss(self) -> float:
        """Points of that figure below the encoder."""
        return -self.worst.gain

    @property
    def shown(self) -> tuple[str, ...]:
        """The cells that every table has: name, speed, its ratio, time of a text, that figure, its change."""
        worst, speed = self.worst, self.speed
        change = f"{worst.gain:+.1f} [{worst.gain_low:+.1f}, {worst.gain_high:+.1f}]"
        rates = (f"{speed.texts_per_s:,.0f}", f"{self.ratio:.2f}", f"{speed.p50_ms:.2f}")
        return self.point.name, *rates, self.lost, change

    def __str__(self) -> str:
        name, rate, *_ = self.shown
        return (
            f"{name} ({rate} texts/s, {self.loss:.1f} points of {self.lost} below the "
            f"encoder [{-self.worst.gain_high:.1f}, {-self.worst.gain_low:.1f}])"
        )


def _order(row: Row) -> tuple[float, float, int]:
    """Fastest first; of points that share an encoder, the better one, then the one with the shorter vectors."""
    return -row.speed.texts_per_s, row.loss, row.quality.vector_bytes


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other beats in speed and quality, fastest first; of equal ones, the shortest vectors."""
    front: list[Row] = []
    for row in sorted(rows, key=_order):
        if not front or row.loss < front[-1].loss:
            front.append(row)
    return front


def choose(rows: Sequence[Row], max_loss: float | None, min_speed: float | None) -> tuple[Row, str]:
    """Choose a point, and return it with the reason.

    With a limit on the loss, the fastest within it; with a floor of speed alone, the best above it.

    Raises:
        InputError: none fits; the message names the nearest.
    """
    limits = [f"loses at most {max_loss:g} points"] if max_loss is not None else []
    limits += [f"encodes {min_speed:,.0f} texts/s"] if min_speed is not None else []
    close = [row for row in rows if max_loss is None or row.loss <= max_loss]
    fast = [row for row in close if min_speed is None or row.speed.texts_per_s >= min_speed]
    if not fast:
        nearest = min(close, key=_order) if close else min(rows, key=lambda row: (row.loss, *_order(row)))
        raise InputError(
            f"no candidate {' and '.join(limits)}: the nearest is {nearest}. Change the limit, or add candidates"
        )
    if max_loss is not None:
        return (row := min(fast, key=_order)), f"{row} is the fastest that {' and '.join(limits)}"
    row = min(fast, key=lambda row: (row.loss, *_order(row)))
    return row, f"{row} is the best that {' and '.join(limits)}"
