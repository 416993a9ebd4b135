"""Plots of a report, as PNG files. Drawn with the Agg canvas: no display, no global state."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.results import Report

LATENCY_FILE = "latency.png"
THROUGHPUT_FILE = "throughput.png"


def draw_plots(report: Report, folder: Path) -> tuple[str, ...]:
    """Draw what the report has figures for, and give the file names."""
    drawn = []
    if report.latency:
        _save(_latency(report), folder / LATENCY_FILE)
        drawn.append(LATENCY_FILE)
    if report.throughput or report.peers:
        _save(_throughput(report), folder / THROUGHPUT_FILE)
        drawn.append(THROUGHPUT_FILE)
    return tuple(drawn)


def _latency(report: Report) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(r.point.name for r in report.latency):
        points = [r for r in report.latency if r.point.name == name]
        tokens = [r.tokens for r in points]
        (line,) = axes.plot(tokens, [r.p50_ms for r in points], marker="o", label=f"{name}, p50")
        axes.fill_between(
            tokens, [r.p50_ms for r in points], [r.p99_ms for r in points], color=line.get_color(), alpha=0.15
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({r.tokens for r in report.latency})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("milliseconds (band: to p99)")
    axes.set_title("One text at a time", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _throughput(report: Report) -> Figure:
    """Draw rates as bars with their range; beside peers only the rounds that took turns with them are drawn."""
    ours = report.ours_beside_peers or report.throughput
    bars = [(r.point.name, r.texts_per_s, r.texts_per_s_min, r.texts_per_s_max, "C0") for r in ours]
    bars += [(r.name, r.texts_per_s, r.texts_per_s_min, r.texts_per_s_max, "0.6") for r in report.peers]
    bars.sort(key=lambda bar: bar[1])
    figure = Figure(figsize=(7, 1.2 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    rates = [bar[1] for bar in bars]
    spread = [[rate - bar[2] for rate, bar in zip(rates, bars, strict=True)], [bar[3] - bar[1] for bar in bars]]
    drawn = axes.barh([bar[0] for bar in bars], rates, xerr=spread, color=[bar[4] for bar in bars], capsize=3)
    axes.bar_label(drawn, labels=[f"{rate:,.0f}" for rate in rates], padding=6)
    axes.margins(x=0.15)
    axes.set_xlabel("texts a second (median; whiskers: slowest and fastest round)")
    axes.set_title(f"{report.workload.texts} texts, {report.workload.tokens_mean:.1f} tokens on average", loc="left")
    return figure


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, format="png")
