"""The plot of a plan: speed against exactness, with the Pareto front."""

from __future__ import annotations

from pathlib import Path

from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.plan import Goal, HostPlan, Trial, objective


def pareto(plan: HostPlan) -> list[Trial]:
    """Return the trials that no other beats in both speed and exactness, fastest first."""
    front: list[Trial] = []
    for trial in sorted(plan.measured, key=lambda t: (objective(t, plan.goal), -t.min_cosine)):
        if not front or trial.min_cosine > front[-1].min_cosine:
            front.append(trial)
    return front


def draw(plan: HostPlan, output: Path) -> None:
    """Draw a plan's trials as a PNG."""
    require("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    latency = plan.goal is Goal.LATENCY

    def speed(trial: Trial) -> float:
        return trial.p50_ms if latency else trial.texts_per_s

    def engine(trial: Trial) -> str:
        return f"{trial.setting.engine.value} {trial.setting.precision.value}"

    for label in dict.fromkeys(map(engine, plan.measured)):
        trials = [trial for trial in plan.measured if engine(trial) == label]
        axes.scatter([speed(t) for t in trials], [1 - t.min_cosine for t in trials], label=label)
    front = pareto(plan)
    axes.plot([speed(t) for t in front], [1 - t.min_cosine for t in front], color="grey", linewidth=1, zorder=0)
    chosen = next(trial for trial in plan.measured if trial.setting == plan.chosen)
    axes.annotate("chosen", (speed(chosen), 1 - chosen.min_cosine), xytext=(0, 10), textcoords="offset points")
    axes.axhline(1 - plan.floor, color="red", linestyle=":", label=f"floor {plan.floor}")
    axes.set_yscale("symlog", linthresh=1e-8)
    axes.set_xlabel("p50 of one text, ms" if latency else "texts per second")
    axes.set_ylabel("1 - worst canary cosine")
    axes.set_title(f"{plan.fingerprint} on {plan.host.cores} cores of {plan.host.cpu}")
    axes.legend()
    try:
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from error
