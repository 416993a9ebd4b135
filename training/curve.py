"""The loss curve of a run. Drawn with the Agg canvas: no display, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mirror_runtime.extras import require
from training.checkpoint import Step

CURVE_PACKAGE = "matplotlib.figure"

SMOOTHED = 0.05
"""Window of the running mean, as a share of the steps."""


def draw_curve(steps: Sequence[Step], path: Path) -> None:
    """Draw loss against step, with its running mean, into a PNG file.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    canvas = require("matplotlib.backends.backend_agg", "train").FigureCanvasAgg
    figure = require(CURVE_PACKAGE, "train").Figure(figsize=(7, 3.6), layout="constrained")
    canvas(figure)
    axes = figure.subplots()
    numbers, losses = [step.step for step in steps], np.array([step.loss for step in steps])
    window = max(1, round(SMOOTHED * len(steps)))
    axes.plot(numbers, losses, color="C0", alpha=0.35 if window > 1 else 1, marker="." if len(steps) < 3 else None)
    if window > 1:
        mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(numbers[window - 1 :], mean, color="C0", label=f"mean of {window} steps")
        axes.legend(frameon=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
