"""Tune a masked language model into a text encoder, from raw text: the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mirror_runtime.bundle import Pooling
from mirror_runtime.commandline import run_command
from training.corpus import Corpus
from training.objective import Objective
from training.recipe import RECIPES, Device, Recipe, TunePrecision
from training.run import Job, Summary, tune
from training.trainer import Hardware, Step

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    *,
    base: Annotated[str, typer.Option(help="folder or hub name of a masked language model or encoder")],
    corpus: Annotated[Path, typer.Option(help="UTF-8 text, one sentence, phrase or word a line")],
    output: Annotated[Path, typer.Option(help="run folder to write")],
    pooling: Annotated[Pooling | None, typer.Option(help="needed where the base does not record it")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub name")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an output folder in use, at the end")] = False,
    recipe: Annotated[Recipe, typer.Option(help="where the options below take their defaults")] = Recipe.SENTENCE,
    objective: Annotated[Objective | None, typer.Option(help="what is minimised (sentence: mirror)")] = None,
    seed: Annotated[int | None, typer.Option(help="of shuffling, masks and dropout (42)")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the corpus (sentence: 1)")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="texts a step; 10,000 lines at 200 are 50 steps (sentence: 200)")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="of AdamW, constant (sentence: 2e-5)")] = None,
    temperature: Annotated[float | None, typer.Option(help="divides the cosine (sentence: 0.04; word: 0.2)")] = None,
    mask_length: Annotated[
        int | None, typer.Option(help="characters hidden in the second view; 0 for none (sentence: 5)")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="everywhere in the model (sentence: 0.1)")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="longest text while tuning, [CLS] and [SEP] included (sentence: 50; word: 25)")
    ] = None,
    precision: Annotated[TunePrecision | None, typer.Option(help="auto is bf16 where the device has it")] = None,
    device: Annotated[Device | None, typer.Option(help="auto is the NVIDIA GPU if there is one")] = None,
) -> None:
    """Tune a masked language model into a text encoder, without labels (Mirror-BERT).

    Writes a folder that sentence-transformers loads and that says its pooling (encoder.json). The last line of stdout
    is one JSON object.
    """
    given: dict[str, Any] = {
        "objective": objective,
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "temperature": temperature,
        "mask_length": mask_length,
        "dropout": dropout,
        "max_tokens": max_tokens,
        "precision": precision,
        "device": device,
    }
    config = dataclasses.replace(RECIPES[recipe], **{name: value for name, value in given.items() if value is not None})
    job = Job(
        base=base,
        revision=revision,
        pooling=pooling,
        corpus=corpus,
        output=output,
        overwrite=overwrite,
        config=config,
    )
    summary = _run(job, Console(stderr=True))
    sys.stdout.write(json.dumps(summary.to_json(), ensure_ascii=False) + "\n")


def _run(job: Job, console: Console) -> Summary:
    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tuning", total=None, loss=float("nan"), visible=False)

        def on_start(corpus: Corpus, hardware: Hardware, steps: int) -> None:
            progress.console.print(
                f"{len(corpus.texts):,} distinct lines ({corpus.duplicates:,} repeats and {corpus.empty:,} empty lines "
                f"left out), {steps} steps on {hardware.device.value} in {hardware.precision.value}"
            )
            progress.update(task, total=steps, visible=True)

        def on_step(step: Step) -> None:
            progress.update(task, completed=step.step, loss=step.loss)

        summary = tune(job, on_start, on_step)
    console.print(
        f"{summary.steps} steps in {summary.train_seconds:.1f} s "
        f"({summary.tokens / summary.train_seconds:,.0f} tokens/s), last loss {summary.loss:.4f}, "
        f"{summary.seconds:.1f} s in all. Wrote {summary.output}",
        soft_wrap=True,
    )
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 where the input cannot be used."""
    return run_command(app, argv, "tune.py")


if __name__ == "__main__":
    sys.exit(main())
