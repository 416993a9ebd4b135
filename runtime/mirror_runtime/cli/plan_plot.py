"""The picture of a plan: speed against exactness, with the settings that nothing beats in both."""

from __future__ import annotations

from pathlib import Path

from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.plan import Goal, Plan, Trial, objective


def pareto(plan: Plan) -> list[Trial]:
    """Give the settings that no other beats in speed and exactness both, fastest first."""
    front: list[Trial] = []
    for measured in sorted(plan.measured, key=lambda m: (objective(m, plan.goal), -m.min_cosine)):
        if not front or measured.min_cosine > front[-1].min_cosine:
            front.append(measured)
    return front


def draw(plan: Plan, output: Path) -> None:
    """Draw a plan's settings as a PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    require("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    latency = plan.goal is Goal.LATENCY

    def speed(measured: Trial) -> float:
        return measured.p50_ms if latency else measured.texts_per_s

    for way in dict.fromkeys((m.setting.engine.value, m.setting.precision.value) for m in plan.measured):
        mine = [m for m in plan.measured if (m.setting.engine.value, m.setting.precision.value) == way]
        axes.scatter([speed(m) for m in mine], [1 - m.min_cosine for m in mine], label=" ".join(way))
    front = pareto(plan)
    axes.plot([speed(m) for m in front], [1 - m.min_cosine for m in front], color="grey", linewidth=1, zorder=0)
    chosen = next(m for m in plan.measured if m.setting == plan.chosen)
    axes.annotate("chosen", (speed(chosen), 1 - chosen.min_cosine), xytext=(0, 10), textcoords="offset points")
    axes.axhline(1 - plan.floor, color="red", linestyle=":", label=f"floor {plan.floor}")
    axes.set_yscale("symlog", linthresh=1e-8)
    axes.set_xlabel("p50 of one text, ms" if latency else "texts a second")
    axes.set_ylabel("1 - worst canary cosine")
    axes.set_title(f"{plan.fingerprint} on {plan.host.cores} cores of {plan.host.cpu}")
    axes.legend()
    try:
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from error
