"""Make a static twin of an encoder: `python training/twin.py ENCODER --corpus FILES --output FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mirror_runtime.cli.run import application, print_json, run_command
from training.corpus import CorpusRequest

LISTS = ("--corpus", "--column", "--exclude")


def command(
    encoder: Annotated[
        str,
        typer.Argument(
            help="The teacher: a run folder, a sentence-transformers folder, a bundle, BUNDLE:PRECISION or a hub name. "
            "Name the bundle with which the twin is to serve.",
            show_default=False,
        ),
    ],
    corpus: Annotated[list[str], typer.Option(help="Texts like yours, in the formats of tune.py; 10,000 will do.")],
    output: Annotated[Path, typer.Option(help="Run folder to write.")],
    dimensions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Numbers a token in the table, such as 128 of 384, which makes it a third of the size; a dense layer "
            "leads back to the teacher's space. (all)",
        ),
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="To read from files with columns. (text)")] = None,
    documents: Annotated[bool, typer.Option("--documents", help="The files hold documents, as for tune.py.")] = False,
    sample: Annotated[int | None, typer.Option(help="Number of distinct lines to draw with --seed. (all)")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Evaluation sets or files of lines, whose texts are left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of --sample.")] = 42,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder, at the end.")] = False,
) -> None:
    """Make a static twin of an encoder: a table of token vectors in the encoder's own vector space.

    Writes a folder that to_onnx.py and sentence-transformers load. The teacher encodes its vocabulary and the corpus
    once; those vectors are kept in the user's cache, from which a killed run goes on. MiniLM's twin of 10,000 sentences
    takes about 1.5 GB of memory. The last line of stdout is one JSON object.
    """
    from training.twin_run import make_twin  # imports torch, for which --help does not wait

    request = CorpusRequest(
        files=tuple(corpus),
        columns=tuple(column or ()),
        documents=documents,
        sample=sample,
        exclude=tuple(exclude or ()),
        seed=seed,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, markup=False)
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        report = make_twin(
            encoder,
            request,
            output,
            dimensions=dimensions,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    console.print(f"{report['found']} Wrote {output} in {report['seconds']} s", soft_wrap=True)
    print_json(report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 if the input cannot be used."""
    return run_command(application(command), argv, "twin.py", lists=dict.fromkeys(LISTS))


if __name__ == "__main__":
    sys.exit(main())
