"""Plots of a report, described as data. Drawn with the Agg and SVG canvases: no display, no global state."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.report.record import Condition, Measurement
from benchmarks.report.storage import Report

DPI = 80


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours for a light or a dark page."""

    ink: str
    paper: str
    muted: str
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1a1a1a",
    paper="#ffffff",
    muted="#9a9a9a",
    series=("#0b62a4", "#c04f00", "#2a7a2a", "#8b2f8b", "#7a5c00", "#006d77"),
)
DARK = Theme(
    ink="#e6e6e6",
    paper="#15181c",
    muted="#7d8590",
    series=("#6cb6ff", "#ff9e64", "#7ee787", "#d2a8ff", "#e3b341", "#56d4dd"),
)

RATES = "rates"
"""In place of a suite: "peers" where it was measured, whose rounds interleave ours and theirs, else "throughput"."""


@dataclass(frozen=True)
class Values:
    """Where the numbers of an axis come from.

    Attributes:
        metric: of the measurements, or with an empty `suite` the name of a condition of theirs.
        suite: of the measurements.
        figure: of `Measurement.figure`.
        where: conditions that they have.
        scale: multiplies the figure.
    """

    metric: str
    suite: str = ""
    _: KW_ONLY
    figure: str = "p50"
    where: Mapping[str, Condition] = field(default_factory=dict)
    scale: float = 1.0

    def of(self, report: Report) -> list[Measurement]:
        """Return the measurements."""
        suite = report.rate_suite if self.suite == RATES else self.suite
        return report.select(suite, self.metric, **self.where)

    def number(self, measurement: Measurement, figure: str = "") -> float:
        """Return the number of one of them."""
        return self.scale * measurement.figure(figure or self.figure)


@dataclass(frozen=True)
class Plot:
    """A plot's description.

    Attributes:
        draw: one of the functions below; it draws into the figure's axes.
        x: of "lines", a condition of the measurements of `y` or another metric under the same conditions.
        band: figure that a band above each line reaches to.
        dashed: figure of a second, dashed line.
        complete: every party with a `y` must have an `x`.
    """

    title: str
    caption: str
    draw: Callable[[Report, Plot, Theme, Any], None]
    _: KW_ONLY
    y: Values
    x: Values | None = None
    x_label: str = ""
    y_label: str = ""
    x_log: int = 0
    y_log: bool = False
    band: str = ""
    dashed: str = ""
    complete: bool = False


def draw_plots(report: Report, folder: Path) -> dict[str, str]:
    """Draw what the report has figures for as PNG files; return each plot's name and file name."""
    files = {}
    for name in drawable(report):
        files[name] = f"{name}.png"
        figure = draw(name, report, LIGHT)
        FigureCanvasAgg(figure)
        figure.savefig(folder / files[name], dpi=DPI, format="png")
    return files


def drawable(report: Report) -> tuple[str, ...]:
    """Name the plots that the report has figures for."""
    return tuple(name for name, plot in PLOTS.items() if _has_figures(report, plot))


def draw(name: str, report: Report, theme: Theme) -> Figure:
    """Draw one of `drawable`."""
    plot = PLOTS[name]
    figure = Figure(figsize=(7, 4.2), layout="constrained", facecolor=theme.paper)
    axes: Any = figure.subplots()
    axes.set_facecolor(theme.paper)
    axes.set_prop_cycle(color=theme.series)
    axes.tick_params(colors=theme.ink, which="both")
    for spine in axes.spines.values():
        spine.set_color(theme.muted)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(plot.x_label, color=theme.ink)
    axes.set_ylabel(plot.y_label, color=theme.ink)
    axes.grid(alpha=0.25, color=theme.muted)
    axes.set_axisbelow(True)
    axes.set_title(plot.title, loc="left", color=theme.ink)
    plot.draw(report, plot, theme, axes)
    if plot.draw not in (_bars, _scatter):
        axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


def svg(figure: Figure) -> str:
    """Return a figure as SVG text, the same bytes for the same figure."""
    target = io.StringIO()
    # Text as outlines: the page must look the same where the font is missing.
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return target.getvalue()


def pairs(report: Report, plot: Plot) -> list[tuple[str, float, float]]:
    """Return (party, x, y) of the parties that have both."""
    assert plot.x is not None  # such a plot has two metrics
    across = {one.party: plot.x.number(one) for one in plot.x.of(report)}
    return [(one.party, across[one.party], plot.y.number(one)) for one in plot.y.of(report) if one.party in across]


def _has_figures(report: Report, plot: Plot) -> bool:
    found = plot.y.of(report)
    if plot.draw is _samples:
        return bool(pairs(report, plot))
    if plot.draw is not _scatter:
        return any(_x(report, plot, one) is not None for one in found)
    both = len(pairs(report, plot))
    return both > 1 and (both == len(found) or not plot.complete)


def _x(report: Report, plot: Plot, measurement: Measurement) -> float | None:
    """Return the place on the x axis of a measurement of `y`: 0 where the plot has no such axis."""
    if plot.x is None:
        return 0.0
    if not plot.x.suite:
        value = measurement.conditions.get(plot.x.metric)
        return None if value is None else float(value)
    beside = [
        one for one in plot.x.of(report) if (one.party, one.conditions) == (measurement.party, measurement.conditions)
    ]
    return plot.x.number(beside[0]) if beside else None


def _lines(report: Report, plot: Plot, theme: Theme, axes: Any) -> None:
    """Draw a line for each party."""
    points = [(x, one) for one in plot.y.of(report) if (x := _x(report, plot, one)) is not None]
    for party in dict.fromkeys(one.party for _, one in points):
        mine = sorted(((x, one) for x, one in points if one.party == party), key=lambda point: point[0])
        across = [x for x, _ in mine]
        label = f"{party}, {plot.y.figure}" if plot.band or plot.dashed else party
        (line,) = axes.plot(across, [plot.y.number(one) for _, one in mine], marker="o", label=label)
        if plot.band:
            low, high = ([plot.y.number(one, figure) for _, one in mine] for figure in (plot.y.figure, plot.band))
            axes.fill_between(across, low, high, color=line.get_color(), alpha=0.15)
        if plot.dashed:
            dashed = [plot.y.number(one, plot.dashed) for _, one in mine]
            axes.plot(across, dashed, "--", color=line.get_color(), label=f"{party}, {plot.dashed}")
    if plot.x_log:
        axes.set_xscale("log", base=plot.x_log)
    if plot.x_log == 2:
        ticks = sorted({x for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    if plot.y_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _distribution(report: Report, plot: Plot, theme: Theme, axes: Any) -> None:
    """Draw each party's samples at its shortest text, where the runtime's own share of the time is largest."""
    found = plot.y.of(report)
    shortest = min(int(one.conditions["tokens"]) for one in found)
    axes.set_title(f"Texts of {shortest} tokens", loc="left", color=theme.ink)
    for one in found:
        if one.conditions["tokens"] == shortest:
            samples = np.sort(np.asarray(one.samples))
            axes.step(samples, np.arange(1, samples.size + 1) / samples.size, where="post", label=one.party)
    axes.set_ylim(0, 1.01)
    axes.set_xscale("log")


def _bars(report: Report, plot: Plot, theme: Theme, axes: Any) -> None:
    """Draw medians as bars, with whiskers from the slowest to the fastest round."""
    found = sorted(plot.y.of(report), key=plot.y.number)
    axes.figure.set_figheight(1.4 + 0.45 * len(found))
    work = report.facts.workload
    title = f"{work.texts} texts, {work.tokens_mean:.1f} tokens on average"
    axes.set_title(title, loc="left", color=theme.ink)
    rates = [plot.y.number(one) for one in found]
    low, high = ([plot.y.number(one, figure) for one in found] for figure in ("min", "max"))
    drawn = axes.barh(
        [one.party for one in found],
        rates,
        xerr=[np.subtract(rates, low), np.subtract(high, rates)],
        color=[theme.muted if report.is_peer(one.party) else theme.series[0] for one in found],
        capsize=3,
        ecolor=theme.ink,
    )
    axes.bar_label(drawn, labels=[f"{rate:,.0f}" for rate in rates], padding=6, color=theme.ink)
    axes.margins(x=0.15)


def _scatter(report: Report, plot: Plot, theme: Theme, axes: Any) -> None:
    """Draw numbered marks with their names below: names beside a dozen marks would cover each other."""
    marks = sorted(pairs(report, plot), key=lambda mark: -mark[2])
    axes.figure.set_figheight(4.4 + 0.11 * len(marks))
    for number, (party, x, y) in enumerate(marks, 1):
        colour, shape = (theme.muted, "s") if report.is_peer(party) else (theme.series[0], "o")
        axes.plot(x, y, shape, color=colour, markersize=9, label=f"{number}  {party}")
        axes.annotate(str(number), (x, y), xytext=(7, 4), textcoords="offset points", color=theme.ink, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=theme.ink, fontsize=8)


def _samples(report: Report, plot: Plot, theme: Theme, axes: Any) -> None:
    """Draw each party's samples of `y` against those of `x`."""
    assert plot.x is not None  # it has two metrics
    across = {one.party: one.samples for one in plot.x.of(report)}
    for one in plot.y.of(report):
        axes.plot(across[one.party], one.samples, "o", label=f"{one.party}: {one.median:.1f}")
    axes.set_xscale("log")


_RATE = Values("texts per second", RATES)

PLOTS: Mapping[str, Plot] = {
    "latency": Plot(
        "One text at a time",
        "Latency of one text against its length",
        _lines,
        y=Values("time per text", "latency"),
        x=Values("tokens"),
        band="p99",
        x_log=2,
        x_label="tokens of each text",
        y_label="milliseconds (band: to p99)",
    ),
    "latency_cdf": Plot(
        "",
        "Distribution of latencies",
        _distribution,
        y=Values("time per text", "latency"),
        x_label="milliseconds",
        y_label="share of texts done within",
    ),
    "throughput": Plot(
        "",
        "Texts per second",
        _bars,
        y=_RATE,
        x_label="texts per second, median\nwhiskers: slowest and fastest round; grey: peers",
    ),
    "agreement": Plot(
        "Speed and agreement",
        "Speed against the worst cosine to the bundle's own fp32 vectors",
        _scatter,
        y=_RATE,
        x=Values("worst cosine to fp32", RATES, figure="min"),
        complete=True,
        x_label="worst text's cosine to the bundle's fp32 (right is better; squares: peers)",
        y_label="texts per second",
    ),
    "lengths": Plot(
        "Texts of one length",
        "Throughput against length",
        _lines,
        y=Values("tokens per second", "throughput"),
        x=Values("tokens"),
        x_log=2,
        x_label="tokens of each text",
        y_label="tokens per second",
    ),
    "pareto": Plot(
        "Speed and quality",
        "Speed against quality",
        _scatter,
        y=_RATE,
        x=Values("Spearman x 100", "quality", where={"set": "mean"}),
        x_label="mean Spearman x 100 (right is better; squares: peers)",
        y_label="texts per second",
    ),
    "serving": Plot(
        "Single texts that arrive at random",
        "Load against latency",
        _lines,
        y=Values("time per request", "serving", figure="p99", where={"loop": "open"}),
        x=Values("offered per second", "serving"),
        dashed="p50",
        y_log=True,
        x_label="texts offered per second",
        y_label="milliseconds from the moment it was due",
    ),
    "scaling": Plot(
        "More texts",
        "Time per text against the number of texts",
        _lines,
        y=Values("time per text", "scaling"),
        x=Values("texts"),
        x_log=10,
        x_label="texts",
        y_label="microseconds per text",
    ),
    "scaling_memory": Plot(
        "More texts",
        "Peak memory against the number of texts",
        _lines,
        y=Values("peak memory", "scaling", scale=1e-6),
        x=Values("texts"),
        x_log=10,
        x_label="texts",
        y_label="peak memory in MB",
    ),
    "training": Plot(
        "Tuning",
        "Seconds of tuning against the mean score",
        _samples,
        y=Values("Spearman x 100", "training", where={"set": "mean"}),
        x=Values("time to the saved folder", "training"),
        x_label="seconds from process start to the saved folder",
        y_label="mean Spearman x 100",
    ),
}
