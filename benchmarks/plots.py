"""Drawings of a report. Drawn with the Agg and SVG canvases: no display, no global state."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.quality_results import QualityResult
from benchmarks.results import Report
from benchmarks.summary import median


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a drawing: for a light or a dark page."""

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


def draw_plots(report: Report, folder: Path) -> dict[str, str]:
    """Draw what the report has figures for as PNG files; returns each drawing's name and file name."""
    files = {}
    for name in drawable(report):
        files[name] = f"{name}.png"
        figure = draw(name, report, LIGHT)
        FigureCanvasAgg(figure)
        figure.savefig(folder / files[name], dpi=120, format="png")
    return files


def drawable(report: Report) -> tuple[str, ...]:
    """Name the drawings that the report has figures for."""
    return tuple(name for name, (needs, _) in _DRAWINGS.items() if needs(report))


def draw(name: str, report: Report, theme: Theme) -> Figure:
    """Draw one of `drawable`."""
    figure: Figure = _DRAWINGS[name][1](report, theme)
    figure.set_facecolor(theme.paper)
    return figure


def svg(figure: Figure) -> str:
    """Give a figure as SVG text, the same bytes for the same figure."""
    target = io.StringIO()
    # Text as outlines: the page must look the same where the font is missing.
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return target.getvalue()


def _axes(figure: Figure, theme: Theme, title: str) -> Any:
    axes = figure.subplots()
    axes.set_facecolor(theme.paper)
    axes.set_prop_cycle(color=theme.series)
    axes.set_title(title, loc="left", color=theme.ink)
    axes.tick_params(colors=theme.ink, which="both")
    for spine in axes.spines.values():
        spine.set_color(theme.muted)
    axes.spines[["top", "right"]].set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
    axes.grid(alpha=0.25, color=theme.muted)
    axes.set_axisbelow(True)
    return axes


def _legend(axes: Any, theme: Theme) -> None:
    axes.legend(frameon=False, labelcolor=theme.ink)


def _token_axis(axes: Any, tokens: Collection[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(tokens), [str(count) for count in sorted(tokens)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of each text")


def _latency(report: Report, theme: Theme) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = _axes(figure, theme, "One text at a time")
    for name in dict.fromkeys(r.point.name for r in report.latency):
        points = [r for r in report.latency if r.point.name == name]
        tokens = [r.tokens for r in points]
        (line,) = axes.plot(tokens, [r.p50_ms for r in points], marker="o", label=f"{name}, p50")
        axes.fill_between(
            tokens, [r.p50_ms for r in points], [r.p99_ms for r in points], color=line.get_color(), alpha=0.15
        )
    _token_axis(axes, {r.tokens for r in report.latency})
    axes.set_ylabel("milliseconds (band: to p99)")
    _legend(axes, theme)
    return figure


def _latency_cdf(report: Report, theme: Theme) -> Figure:
    """Draw each point's distribution at its shortest text, where the runtime's own share of the time is largest."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    shortest = min(r.tokens for r in report.latency)
    axes = _axes(figure, theme, f"Texts of {shortest} tokens")
    for result in report.latency:
        if result.tokens == shortest:
            samples = np.sort(np.asarray(result.samples_ms))
            axes.step(samples, np.arange(1, samples.size + 1) / samples.size, where="post", label=result.point.name)
    axes.set_ylim(0, 1.01)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("share of texts done within")
    _legend(axes, theme)
    return figure


def _throughput(report: Report, theme: Theme) -> Figure:
    """Draw rates as bars with their range; beside peers only the rounds that took turns with them are drawn."""
    ours = report.ours_beside_peers or report.throughput
    bars = [(r.point.name, r.texts_per_s, r.texts_per_s_min, r.texts_per_s_max, theme.series[0]) for r in ours]
    bars += [(r.name, r.texts_per_s, r.texts_per_s_min, r.texts_per_s_max, theme.muted) for r in report.peers]
    bars.sort(key=lambda bar: bar[1])
    figure = Figure(figsize=(7, 1.4 + 0.45 * len(bars)), layout="constrained")
    work = report.workload
    axes = _axes(figure, theme, f"{work.texts} texts, {work.tokens_mean:.1f} tokens on average")
    rates = [bar[1] for bar in bars]
    spread = [[rate - bar[2] for rate, bar in zip(rates, bars, strict=True)], [bar[3] - bar[1] for bar in bars]]
    drawn = axes.barh(
        [bar[0] for bar in bars], rates, xerr=spread, color=[bar[4] for bar in bars], capsize=3, ecolor=theme.ink
    )
    axes.bar_label(drawn, labels=[f"{rate:,.0f}" for rate in rates], padding=6, color=theme.ink)
    axes.margins(x=0.15)
    axes.set_xlabel("texts a second, median\nwhiskers: slowest and fastest round; grey: peers")
    return figure


def _lengths(report: Report, theme: Theme) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = _axes(figure, theme, "Texts of one length")
    for name in dict.fromkeys(r.point.name for r in report.lengths):
        points = sorted((r.tokens, r.tokens_per_s) for r in report.lengths if r.point.name == name)
        axes.plot([tokens for tokens, _ in points], [rate for _, rate in points], marker="o", label=name)
    _token_axis(axes, {r.tokens for r in report.lengths})
    axes.set_ylabel("tokens a second")
    _legend(axes, theme)
    return figure


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """A party in a scatter plot."""

    name: str
    x: float
    y: float
    ours: bool


def _scatter(theme: Theme, title: str, marks: Sequence[_Mark]) -> tuple[Figure, Any]:
    """Draw numbered marks with their names beneath: names beside a dozen marks would cover each other."""
    figure = Figure(figsize=(7, 4.4 + 0.11 * len(marks)), layout="constrained")
    axes = _axes(figure, theme, title)
    for number, mark in enumerate(sorted(marks, key=lambda mark: -mark.y), 1):
        colour, shape = (theme.series[0], "o") if mark.ours else (theme.muted, "s")
        axes.plot(mark.x, mark.y, shape, color=colour, markersize=9, label=f"{number}  {mark.name}")
        axes.annotate(
            str(number), (mark.x, mark.y), xytext=(7, 4), textcoords="offset points", color=theme.ink, fontsize=9
        )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    axes.set_ylabel("texts a second")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=theme.ink, fontsize=8)
    return figure, axes


def _worth_and_rate(report: Report) -> list[tuple[QualityResult, float]]:
    """Give the parties whose quality and speed are both known; beside peers, their rates are of the same rounds."""
    ours = report.ours_beside_peers or report.throughput
    rates = {r.point.name: r.texts_per_s for r in ours} | {r.name: r.texts_per_s for r in report.peers}
    return [(result, rates[result.party]) for result in report.quality if result.party in rates]


def _pareto(report: Report, theme: Theme) -> Figure:
    """Draw people's agreement against speed: up and to the right is better."""
    marks = [
        _Mark(name=result.party, x=result.mean.value, y=rate, ours=result.ours)
        for result, rate in _worth_and_rate(report)
    ]
    figure, axes = _scatter(theme, "Speed and quality", marks)
    axes.set_xlabel("mean Spearman x 100 (right is better; squares: peers)")
    return figure


def _serving(report: Report, theme: Theme) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = _axes(figure, theme, "Single texts that arrive at random")
    for result in report.serving:
        if result.open:
            offered, name = [loop.offered_per_s for loop in result.open], result.name
            p50, p99 = [loop.p50_ms for loop in result.open], [loop.p99_ms for loop in result.open]
            (line,) = axes.plot(offered, p99, marker="o", label=f"{name}, p99")
            axes.plot(offered, p50, "--", color=line.get_color(), label=f"{name}, p50")
            lost = [(loop.offered_per_s, loop.p99_ms) for loop in result.open if not loop.kept_up]
            axes.plot([x for x, _ in lost], [y for _, y in lost], "x", color=line.get_color(), markersize=12)
    axes.set_yscale("log")
    axes.set_xlabel("texts offered a second (cross: not kept up with)")
    axes.set_ylabel("milliseconds from the moment it was due")
    _legend(axes, theme)
    return figure


def _training(report: Report, theme: Theme) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = _axes(figure, theme, "Tuning")
    for result in report.training:
        seconds, scores = [run.seconds for run in result.runs], [run.mean for run in result.runs]
        axes.plot(seconds, scores, "o", label=f"{result.party}: {median(seconds):.0f} s, {median(scores):.1f}")
    axes.set_xscale("log")
    axes.set_xlabel("seconds from process start to the saved folder")
    axes.set_ylabel("mean Spearman x 100")
    _legend(axes, theme)
    return figure


def _scaling(report: Report, theme: Theme) -> Figure:
    """Draw what should be two flat lines: a text's time and the memory, against the number of texts."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = _axes(figure, theme, "More texts")
    memory = axes.twinx()
    memory.tick_params(colors=theme.ink, which="both")
    memory.spines[["top"]].set_visible(False)
    for spine in memory.spines.values():
        spine.set_color(theme.muted)
    for result in report.scaling:
        texts = [size.texts for size in result.sizes]
        (line,) = axes.plot(texts, [size.us_per_text for size in result.sizes], marker="o", label=result.point.name)
        memory.plot(texts, [size.peak_bytes / 1e6 for size in result.sizes], "s--", color=line.get_color(), alpha=0.6)
    axes.set_xscale("log")
    axes.set_xlabel("texts")
    sizes = [size for result in report.scaling for size in result.sizes]
    axes.set_ylim(0, 1.15 * max(size.us_per_text for size in sizes))
    memory.set_ylim(0, 1.15 * max(size.peak_bytes / 1e6 for size in sizes))
    axes.set_ylabel("microseconds a text (line)")
    memory.set_ylabel("peak memory in MB (dashes)", color=theme.ink)
    axes.legend(loc="lower left", frameon=False, labelcolor=theme.ink)
    return figure


_DRAWINGS: Mapping[str, tuple[Callable[[Report], object], Callable[[Report, Theme], Figure]]] = {
    "latency": (lambda r: r.latency, _latency),
    "latency_cdf": (lambda r: r.latency, _latency_cdf),
    "throughput": (lambda r: r.throughput or r.peers, _throughput),
    "lengths": (lambda r: r.lengths, _lengths),
    "pareto": (lambda r: len(_worth_and_rate(r)) > 1, _pareto),
    "serving": (lambda r: any(result.open for result in r.serving), _serving),
    "scaling": (lambda r: any(result.sizes for result in r.scaling), _scaling),
    "training": (lambda r: r.training, _training),
}
