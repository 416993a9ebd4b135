"""What a front shows: a page with the result first, a picture, and a record of every measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.tradeoff.candidates import ENCODER
from export.tradeoff.choose import HEAD, Row, choose, pareto
from mirror_runtime.bundle import to_json
from mirror_runtime.extras import require

WITHIN = 1.0
"""Points of its worst figure that the result in one sentence may lose."""

INK, MUTED, FRONT = "#1a1a1a", "#9a9a9a", "#0b62a4"

RINGS = (11, 20, 32, 46, 62, 80, 100, 125, 150)
"""Distances of a label from its mark, in points, tried in turn."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """Everything that one run found."""

    encoder: str
    rows: tuple[Row, ...]  # fastest first; those of the encoder itself are among them
    failed: Mapping[str, str]  # candidates and points that could not be made or measured, with the reason
    facts: Mapping[str, Any]  # texts, machine, versions, times and memory, for the record
    choice: tuple[Row, str] | None = None  # and the reason

    @property
    def best(self) -> Row:
        """The encoder in its fastest precision, to which rates are compared."""
        return max(
            (row for row in self.rows if row.point.made.candidate.name == ENCODER),
            key=lambda row: row.speed.texts_per_s,
        )

    @property
    def sentence(self) -> str:
        """The result."""
        close, _ = choose(self.rows, max(WITHIN, min(row.loss for row in self.rows)), None)
        fastest = pareto(self.rows)[0]

        def name(row: Row) -> str:
            return (
                f"{row.point.name} encodes {row.speed.texts_per_s:,.0f} texts/s, {row.ratio:.1f} times the encoder's "
                f"{self.best.point.precision.value}, and keeps {_number(row.worst.share)} % of "
                f"{row.lost}, which loses most"
            )

        more = "" if fastest is close else f"; the fastest of all, {name(fastest)}"
        return f"Within {WITHIN:g} point of the encoder, {name(close)}{more}."


def page(front: Front) -> str:
    """Write the report as Markdown."""
    facts, asked = front.facts, max(one.samples for one in front.rows[0].quality.results if one.task == "probe")
    on_front = pareto(front.rows)
    figures = [f"{one.set}, {one.metric} (% of the encoder's)" for one in front.rows[0].quality.results]
    head = [*HEAD, "top 10", "cosine", *figures, "worst own cosine", "B a vector", "bundle MB", "front"]
    lines = [
        f"# Speed and quality of {front.encoder}",
        "",
        front.sentence,
        "",
        *([f"Chosen: {front.choice[1]}.", ""] if front.choice else []),
        "![texts a second against quality](front.png)",
        "",
        f"{facts['texts']:,} texts, of which {facts['held_out']:,} were held out before anything was trained: quality "
        f"is measured on these ({asked:,} questions; 95 % intervals, changes are paired) and on "
        "labelled sets, if any were named; the figure that loses most decides. "
        f"Speeds: {facts['speed_texts']:,} texts, tokenising included, all candidates in turns, medians of "
        f"{facts['rounds']} rounds on {facts['cores']} cores of {facts['cpu']}; × is to the encoder's "
        f"{front.best.point.precision.value}. This run took {facts['seconds'] / 60:.1f} minutes; peak memory "
        f"{facts['peak_memory_mb']:,} MB, and {facts['peak_child_memory_mb']:,} MB in one of its commands.",
        "",
        "Top 10: the share of each text's ten nearest that the encoder has too. Cosine: the mean to the encoder's "
        "vectors, where both have the same width. Worst own cosine: to the candidate's own PyTorch reference, from its "
        "certificate. A cut vector is computed as fast as a whole one: it saves memory and search.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(_cells(row, row in on_front))} |" for row in front.rows),
        "",
    ]
    if front.failed:
        lines += ["## Failed", "", *(f"- {name}: {why}" for name, why in front.failed.items()), ""]
    made = {row.point.made.candidate.name: row.point.made for row in front.rows}
    lines += ["## How each was made", ""]
    for one in made.values():
        lines += [f"{one.candidate.name}, {one.record.seconds:.0f} s:", ""]
        lines += [*(f"    python {line}" for line in one.record.commands), ""]
    return "\n".join(lines)


def _cells(row: Row, on_front: bool) -> Iterator[str]:
    quality = row.quality
    yield from row.shown
    yield f"{quality.top10:.1f}"
    yield _number(quality.cosine, 4)
    for one in quality.results:
        yield f"{one.value:.1f} ({_number(one.share)})"
    yield f"{quality.certified:.4f}"
    yield f"{quality.vector_bytes:,}"
    yield f"{quality.bundle_bytes / 1e6:.0f}"
    yield "●" if on_front else ""


def _number(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def records(front: Front) -> dict[str, Any]:
    """Return a JSON object with one record a measurement."""
    found: list[dict[str, Any]] = []
    for row in front.rows:
        point, quality = row.point, row.quality
        names: dict[str, Any] = {
            "point": point.name,
            "candidate": point.made.candidate.name,
            "precision": point.precision.value,
        }
        names["dimensions"] = point.dimensions
        speed = {"samples": len(row.speed.rates), "low": min(row.speed.rates), "high": max(row.speed.rates)}
        plain: dict[str, tuple[float | None, str]] = {
            "time of one text": (row.speed.p50_ms, "ms"),
            "ratio to the encoder's fastest": (row.ratio, ""),
            "top 10": (quality.top10, "%"),
            "cosine to the encoder": (quality.cosine, ""),
            "worst cosine of the certificate": (quality.certified, ""),
            "vector": (quality.vector_bytes, "B"),
            "bundle": (quality.bundle_bytes, "B"),
        }
        found.append(names | {"metric": "texts per second", "unit": "1/s", "value": row.speed.texts_per_s} | speed)
        found += [
            names | {"metric": metric, "unit": unit, "value": value}
            for metric, (value, unit) in plain.items()
            if value is not None
        ]
        found += [names | {"unit": "%"} | to_json(one) for one in quality.results]
    return {
        "encoder": front.encoder,
        "result": front.sentence,
        "facts": dict(front.facts),
        "front": [row.point.name for row in pareto(front.rows)],
        "chosen": front.choice and {"point": front.choice[0].point.name, "reason": front.choice[1]},
        "failed": dict(front.failed),
        "records": found,
    }


def draw(front: Front) -> Any:
    """Draw speed against quality, with the front as a line and a name beside each mark, into matplotlib's figure."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(9, 6), layout="constrained")
    require("matplotlib.backends.backend_agg", "train").FigureCanvasAgg(figure)
    axes = figure.subplots()
    best = pareto(front.rows)
    axes.plot(*_places(best), color=FRONT, linewidth=1, zorder=1)
    axes.scatter(*_places(front.rows), color=[FRONT if row in best else MUTED for row in front.rows], zorder=2)
    if front.choice:
        axes.scatter(*_places([front.choice[0]]), s=140, facecolors="none", edgecolors=INK, zorder=3)
    axes.set_xscale("log")
    axes.set_xlabel("texts per second, tokenising included")
    axes.set_ylabel("points over the encoder on held-out texts, of the figure that loses most")
    axes.set_title(f"{front.encoder} on {front.facts['cores']} cores of {front.facts['cpu']}", loc="left", fontsize=10)
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.25, which="both")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places were measured in this layout
    _label(axes, front.rows, best)
    return figure


def _places(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.speed.texts_per_s for row in rows], [row.worst.gain for row in rows]


def _label(axes: Any, rows: Sequence[Row], best: Sequence[Row]) -> None:
    """Put each name at the nearest place where it covers no mark, no other name and no edge."""
    marks = axes.transData.transform(list(zip(*_places(rows), strict=True)))
    taken = [require("matplotlib.transforms", "train").Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in marks]
    renderer, frame = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    for row, place in sorted(zip(rows, zip(*_places(rows), strict=True), strict=True), key=lambda one: -one[1][1]):
        options: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "ha": "center", "va": "center"}
        options |= {"color": INK if row in best else "#666666"}
        options["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        label = axes.annotate(row.point.name, place, xytext=(0, 0), **options)
        width = label.get_window_extent(renderer).width * 72 / axes.figure.dpi
        for ring in RINGS:
            for angle in range(0, 360, 30):
                across = math.cos(math.radians(angle))
                label.set_position((across * (ring + width / 2), math.sin(math.radians(angle)) * ring))
                box = label.get_window_extent(renderer).padded(1)
                if frame.containsx(box.x0) and frame.containsx(box.x1) and not any(map(box.overlaps, taken)):
                    break
            else:
                continue
            break
        if ring > RINGS[0]:
            axes.annotate(
                "", place, xytext=label.get_position(), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5}, zorder=0,
            )  # fmt: skip
        taken.append(box)
