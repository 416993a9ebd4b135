"""The command `mirror plan`, and its plot of speed against exactness with the Pareto front."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mirror_runtime.cache import AUTO_CACHE, cache_folder
from mirror_runtime.cli.options import BundleArgument, ColumnOption
from mirror_runtime.cli.run import print_json, truncations_counted_elsewhere
from mirror_runtime.corpus.corpus import open_corpus
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.plan import Goal, HostPlan, Trial, objective, plan_path, write_plan
from mirror_runtime.planner import FLOOR, QUICK, Budget, Planner
from mirror_runtime.stdlib_texts import standard_library

MOST_TEXTS = 100_000
"""Maximum texts read from a file: a plan needs a sample."""


def plan(
    bundle: BundleArgument,
    goal: Annotated[
        Goal, typer.Option("--for", help="Optimise for one short text (latency) or many texts a second (throughput).")
    ] = Goal.THROUGHPUT,
    floor: Annotated[
        float,
        typer.Option(
            help="Lowest acceptable cosine, in the certificate and here. 0.999 accepts bf16, 0.98 int8 as well."
        ),
    ] = FLOOR,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts like those you will encode, in a file as for mirror encode. Default: docstrings of Python's "
            "library."
        ),
    ] = None,
    column: ColumnOption = "text",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer texts, rounds and candidates: a rough plan.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: in the cache, where auto finds it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw speed against exactness, as a PNG.")] = None,
) -> None:
    """Measure engines, precisions, streams and row shapes on this host, and write the best as the plan for "auto".

    Within a step, settings are measured in interleaved rounds and compared by their medians. Run it when the machine
    is otherwise idle: it takes a minute with --quick, several without.
    """
    folder = cache_folder(AUTO_CACHE)
    if output is None and folder is None:
        raise InputError("this user has no home directory for a cache: set XDG_CACHE_HOME, or pass --output")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with truncations_counted_elsewhere(), Progress(*columns, console=console) as bar:
        task = bar.add_task("reading texts", total=None)

        planner = Planner(
            bundle,
            _texts(texts, column),
            goal=goal,
            floor=floor,
            budget=QUICK if quick else Budget(),
            on_progress=lambda step, done, turns: bar.update(
                task, description=f"measuring {step}", completed=done, total=turns
            ),
        )
        made = planner.plan()
    path = output if output is not None else plan_path(folder or Path(), made.fingerprint)
    write_plan(made, path)
    if plot is not None:
        draw(made, plot)
    console.print(_table(made))
    for name, reason in planner.refused.items():
        console.print(f"{name} was not measured: {reason}")
    chosen = next(trial for trial in made.measured if trial.setting == made.chosen)
    print_json(
        {
            "plan": str(path),
            "chosen": str(made.chosen),
            "texts_per_s": round(chosen.texts_per_s, 1),
            "p50_ms": round(chosen.p50_ms, 3),
            "min_cosine": chosen.min_cosine,
            "measured": len(made.measured),
        }
    )


def _texts(path: Path | None, column: str) -> list[str]:
    """Read the texts to measure with; without a file, the first sentences of the library's docstrings."""
    if path is None:
        return [item.summary for item in standard_library() if item.summary]
    found: list[str] = []
    for row in islice(open_corpus([path], column).rows(), MOST_TEXTS):
        text = row.values[0]
        if not isinstance(text, str):
            raise InputError(f"{row.where}: is {type(text).__name__}, not text")
        found.append(text)
    return found


def _table(plan: HostPlan) -> Table:
    table = Table("engine", "streams", "row", "batch", "texts/s", "p50 ms", "cosine", "")
    for trial in plan.measured:
        setting = trial.setting
        note = "chosen" if setting == plan.chosen else "" if trial.accepted else f"below {plan.floor}"
        table.add_row(
            f"{setting.engine.value} {setting.precision.value}",
            str(setting.streams),
            str(setting.row_tokens),
            str(setting.batch_tokens),
            f"{trial.texts_per_s:,.0f}",
            f"{trial.p50_ms:.2f}",
            f"{min(trial.min_cosine, trial.certified_cosine):.5f}",
            note,
        )
    return table


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
