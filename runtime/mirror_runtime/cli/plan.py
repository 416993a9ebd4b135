"""`mirror plan`: measure the ways to run a bundle here, show them, and keep the best for "auto"."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mirror_runtime.cache import AUTO_CACHE, cache_folder
from mirror_runtime.cli.plan_plot import draw
from mirror_runtime.cli.run import truncations_counted_elsewhere
from mirror_runtime.corpus.files import CorpusFile
from mirror_runtime.docstrings import standard_library
from mirror_runtime.errors import InputError
from mirror_runtime.plan import Goal, Plan, plan_path, write_plan
from mirror_runtime.planner import FLOOR, QUICK, Budget, Planner, Step

MOST_TEXTS = 100_000
"""Read at most from a file of texts: a plan needs a sample."""


def plan(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    goal: Annotated[
        Goal, typer.Option("--for", help="Make one short text fast, or many texts a second.")
    ] = Goal.THROUGHPUT,
    floor: Annotated[
        float,
        typer.Option(help="Worst cosine to accept, of the certificate and here. 0.999 takes bf16, 0.98 int8 as well."),
    ] = FLOOR,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts like those you will encode (.txt, .jsonl, .parquet). Default: docstrings of Python's library.",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer texts, rounds and candidates: a rough plan.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write the plan. Default: the cache, where auto finds it.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw speed against exactness, as a PNG.", show_default=False)
    ] = None,
) -> None:
    """Measure engines, precisions, streams and row shapes on this host, and write the best as the plan for "auto".

    All settings of a step take turns, and medians count. Run it when the machine is otherwise idle: a minute with
    --quick, several without.
    """
    folder = cache_folder(AUTO_CACHE) or Path()
    if output is None and folder == Path():
        raise InputError("this user has no home for a cache: set XDG_CACHE_HOME, or give --output")
    console = Console(stderr=True)
    with (
        truncations_counted_elsewhere(),
        Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console
        ) as bar,
    ):
        task = bar.add_task("reading texts", total=None)

        def report(step: Step) -> None:
            bar.update(task, description=f"measuring {step.name}", completed=step.done, total=step.turns)

        planner = Planner(
            bundle,
            _texts(texts, text_column),
            goal=goal,
            floor=floor,
            effort=QUICK if quick else Budget(),
            report=report,
        )
        made = planner.plan()
    if output is None:
        output = plan_path(folder, made.fingerprint)
    write_plan(made, output)
    if plot is not None:
        draw(made, plot)
    console.print(_table(made))
    for name, reason in planner.refused.items():
        console.print(f"{name} was not measured: {reason}")
    chosen = next(m for m in made.measured if m.setting == made.chosen)
    result = {
        "plan": str(output),
        "chosen": str(made.chosen),
        "texts_per_s": round(chosen.texts_per_s, 1),
        "p50_ms": round(chosen.p50_ms, 3),
        "min_cosine": chosen.min_cosine,
        "measured": len(made.measured),
    }
    sys.stdout.write(json.dumps(result) + "\n")


def _texts(path: Path | None, column: str) -> list[str]:
    if path is None:
        return [item.summary for item in standard_library() if item.summary]
    found: list[str] = []
    for number, row in enumerate(CorpusFile(path=path, column=column).rows(), 1):
        if not isinstance(row.text, str):
            raise InputError(f"{path}, row {number}: is {type(row.text).__name__}, not text")
        found.append(row.text)
        if number == MOST_TEXTS:
            break
    return found


def _table(plan: Plan) -> Table:
    table = Table("engine", "streams", "row", "batch", "texts/s", "p50 ms", "cosine", "")
    for measured in plan.measured:
        setting = measured.setting
        note = "chosen" if setting == plan.chosen else "" if measured.accepted else f"below {plan.floor}"
        table.add_row(
            f"{setting.engine.value} {setting.precision.value}",
            str(setting.streams),
            str(setting.row_tokens),
            str(setting.batch_tokens),
            f"{measured.texts_per_s:,.0f}",
            f"{measured.p50_ms:.2f}",
            f"{min(measured.min_cosine, measured.certified_cosine):.5f}",
            note,
        )
    return table
