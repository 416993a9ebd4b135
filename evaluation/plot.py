"""A plot of all figures with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.similarity import Report
from evaluation.statistics import Result
from mirror_runtime.extras import require
from mirror_runtime.folders import replace_file


def draw(reports: Sequence[Report], yardsticks: Sequence[Result], path: Path) -> None:
    """Draw a row for each figure, a point with its interval for each encoder, and BM25's figures, into a PNG file."""
    canvas = require("matplotlib.backends.backend_agg", "train").FigureCanvasAgg
    first = reports[0]
    names = [f"{one.name}, Spearman" for one in first.results] + [f"{one.set}, {one.metric}" for one in first.tasks]
    figure = require("matplotlib.figure", "train").Figure(figsize=(8, 1.2 + 0.35 * len(names)), layout="constrained")
    canvas(figure)
    axes = figure.subplots()
    for i, report in enumerate(reports):
        values = [one.spearman for one in report.results] + [one.figure for one in report.tasks]
        middle = np.array([one.value for one in values])
        # A percentile interval may leave out the value of a very skewed sample.
        around = np.maximum([middle - [one.low for one in values], [one.high for one in values] - middle], 0)
        places = np.arange(len(values)) + 0.6 * (i + 0.5) / len(reports) - 0.3
        axes.errorbar(middle, places, xerr=around, fmt="o", markersize=4, capsize=2, label=report.label)
    rows = [names.index(f"{one.set}, {one.metric}") for one in yardsticks]
    if rows:
        axes.plot([one.figure.value for one in yardsticks], rows, "k|", markersize=12, label="BM25")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("× 100, with 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(frameon=False, loc="outside upper center")
    with replace_file(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
