"""Plots of a report, described as data. Drawn without pyplot: no display, no global state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report.record import Condition, Measurement
from benchmarks.report.storage import Report

INK, PAPER, MUTED = "#1a1a1a", "#ffffff", "#9a9a9a"
SERIES = ("#0b62a4", "#c04f00", "#2a7a2a", "#8b2f8b", "#7a5c00", "#006d77")

RATES = "rates"
"""In place of a suite: "peers" where it was measured, whose rounds interleave ours and theirs, else "throughput"."""


@dataclass(frozen=True)
class Values:
    """The numbers of an axis: a figure of a suite's metric, or without a suite a condition. `log` is a scale's base."""

    metric: str
    suite: str = ""
    figure: str = "p50"
    _: KW_ONLY
    label: str
    where: Mapping[str, Condition] = field(default_factory=dict)
    log: int = 0

    def of(self, report: Report) -> list[Measurement]:
        """Return the measurements."""
        rates = "peers" if report.select("peers", "texts per second") else "throughput"
        return report.select(rates if self.suite == RATES else self.suite, self.metric, **self.where)

    def number(self, measurement: Measurement, figure: str = "") -> float:
        """Return the number of one of them."""
        return measurement.figure(figure or self.figure)


@dataclass(frozen=True)
class Plot:
    """What to draw with one of the functions below; `dashed` is the figure of a second line.

    On the x axis is a condition of the measurements of `y`, or another metric of the same party.
    """

    draw: Callable[[Report, Plot, Any], None]
    caption: str
    y: Values
    x: Values
    _: KW_ONLY
    dashed: str = ""


def drawable(report: Report) -> list[str]:
    """Name the plots that the report has figures for: two points to scatter, else one."""
    return [name for name, plot in PLOTS.items() if len(points(report, plot)) > (plot.draw is _scatter)]


def draw(name: str, report: Report) -> Figure:
    """Draw one of `drawable`."""
    plot = PLOTS[name]
    figure = Figure(figsize=(7, 4.2), layout="constrained", facecolor=PAPER)
    axes: Any = figure.subplots()
    axes.set(facecolor=PAPER, axisbelow=True)
    axes.set_prop_cycle(color=SERIES)
    axes.tick_params(colors=INK, which="both")
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(plot.x.label, color=INK)
    axes.set_ylabel(plot.y.label, color=INK)
    axes.grid(alpha=0.25, color=MUTED)
    axes.set_title(plot.caption, loc="left", color=INK)
    plot.draw(report, plot, axes)
    if plot.x.log:
        axes.set_xscale("log", base=plot.x.log)
        axes.xaxis.set_major_formatter("{x:g}")  # few ticks, all of them numbers that people know
    if plot.draw not in (_bars, _scatter):
        axes.legend(frameon=False, labelcolor=INK)
    return figure


def points(report: Report, plot: Plot) -> list[tuple[float, Measurement]]:
    """Return the measurements of `y` with their places on the x axis, those that have one."""
    name, found = plot.x.metric, plot.y.of(report)
    if not plot.x.suite:
        return [(float(one.conditions[name]), one) for one in found if name in one.conditions]
    across: dict[object, float] = {}
    for one in plot.x.of(report):
        across |= {one.party: plot.x.number(one), (one.party, one.key[-1]): plot.x.number(one)}
    return [(across.get((one.party, one.key[-1]), across[one.party]), one) for one in found if one.party in across]


def _lines(report: Report, plot: Plot, axes: Any) -> None:
    """Draw a line for each party."""
    found = points(report, plot)
    for at, party in enumerate(dict.fromkeys(one.party for _, one in found)):
        mine = sorted(((x, one) for x, one in found if one.party == party), key=lambda point: point[0])
        for figure, style in {plot.y.figure: "o-", plot.dashed: "--"}.items():
            if figure:
                across, up = zip(*((x, plot.y.number(one, figure)) for x, one in mine), strict=True)
                label = f"{party}, {figure}" if plot.dashed else party
                axes.plot(across, up, style, color=SERIES[at % len(SERIES)], label=label)
    if plot.y.log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _bars(report: Report, plot: Plot, axes: Any) -> None:
    """Draw medians as bars, with whiskers from the slowest to the fastest round."""
    found, work = sorted(plot.y.of(report), key=plot.y.number), report.facts.workload
    axes.figure.set_figheight(1.4 + 0.45 * len(found))
    axes.set_title(f"{work.texts} texts, {work.tokens_mean:.1f} tokens on average", loc="left", color=INK)
    rates, low, high = (np.array([one.figure(name) for one in found]) for name in ("p50", "min", "max"))
    colours = [MUTED if report.library(one.party) else SERIES[0] for one in found]
    names = [one.party for one in found]
    drawn = axes.barh(names, rates, xerr=[rates - low, high - rates], color=colours, capsize=3, ecolor=INK)
    axes.bar_label(drawn, labels=[f"{rate:,.0f}" for rate in rates], padding=6, color=INK)
    axes.margins(x=0.15)


def _scatter(report: Report, plot: Plot, axes: Any) -> None:
    """Draw numbered marks with their names below: names beside a dozen marks would cover each other."""
    marks = sorted(points(report, plot), key=lambda mark: -plot.y.number(mark[1]))
    axes.figure.set_figheight(4.4 + 0.11 * len(marks))
    for number, (x, one) in enumerate(marks, 1):
        y = plot.y.number(one)
        colour, shape = (MUTED, "s") if report.library(one.party) else (SERIES[0], "o")
        axes.plot(x, y, shape, color=colour, markersize=9, label=f"{number}  {one.party}")
        axes.annotate(str(number), (x, y), xytext=(7, 4), textcoords="offset points", color=INK, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=8)


_RATE = Values("texts per second", RATES, label="texts per second")
_MEDIAN = Values("texts per second", RATES, label="median\nwhiskers: slowest and fastest round; grey: peers")
_TOKENS = Values("tokens", label="tokens of each text", log=2)
_TIME = Values("time per text", "latency", label="milliseconds")
_LENGTHS = Values("tokens per second", "throughput", label="tokens per second")
_SCORE = Values(
    "Spearman x 100", "quality", label="mean Spearman x 100 (right is better; squares: peers)", where={"set": "mean"}
)
_DUE = Values(
    "time per request", "serving", "p99", label="milliseconds from when it was due", where={"loop": "open"}, log=10
)
_OFFERED = Values("offered per second", "serving", label="texts offered per second")

PLOTS: Mapping[str, Plot] = {
    "latency": Plot(_lines, "Latency of one text against its length", _TIME, _TOKENS, dashed="p99"),
    "throughput": Plot(_bars, "Texts per second", replace(_RATE, label=""), _MEDIAN),
    "lengths": Plot(_lines, "Throughput against length", _LENGTHS, _TOKENS),
    "pareto": Plot(_scatter, "Speed against quality", _RATE, _SCORE),
    "serving": Plot(_lines, "Load against latency", _DUE, _OFFERED, dashed="p50"),
}
