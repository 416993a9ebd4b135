"""Draw texts a second against quality for faster forms of an encoder: `python export/front.py ENCODER …`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from evaluation.retrieval import read_retrieval
from evaluation.sets import read_sets
from export.tradeoff.candidates import Kind
from mirror_runtime.cli.options import ColumnOption
from mirror_runtime.cli.run import application, print_json, run_command, truncations_counted_elsewhere
from mirror_runtime.corpus.corpus import open_corpus
from mirror_runtime.errors import InputError
from mirror_runtime.tokenizer import validate_text

if TYPE_CHECKING:
    from export.tradeoff.build import OnProgress
    from export.tradeoff.report import Front


def run(
    encoder: Annotated[
        str,
        typer.Argument(help="A run folder, a sentence-transformers folder, or a hub name.", show_default=False),
    ],
    corpus: Annotated[
        list[str],
        typer.Option(
            help="Your texts, in files as for mirror encode; 2,000 or more. A tenth (200 to 1,000) is held out to "
            "measure quality, the rest trains.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for report.md, front.png, front.json and all bundles. What is there is not made again.",
            show_default=False,
        ),
    ],
    column: ColumnOption = "text",
    kinds: Annotated[
        list[Kind] | None,
        typer.Option(
            "--candidates",
            help="What to make besides the encoder in all precisions, such as --candidates vectors. Default: all.",
        ),
    ] = None,
    students: Annotated[
        list[str] | None,
        typer.Option(
            help="Smaller encoders that learn the encoder's vectors, such as a 6-layer one of a 12-layer one.",
            show_default=False,
        ),
    ] = None,
    sts: Annotated[
        list[str] | None, typer.Option(help="Scored pairs to measure on too: stsb-test.tsv.", show_default=False)
    ] = None,
    retrieval: Annotated[
        list[str] | None,
        typer.Option(
            help="BEIR folders to measure on too: corpus.jsonl, queries.jsonl, qrels/test.tsv.", show_default=False
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Write the fastest bundle that loses at most so many points of any figure to OUTPUT/chosen: with "
            "1, 79 of 80 may remain.",
            show_default=False,
        ),
    ] = None,
    min_speed: Annotated[
        float | None,
        typer.Option(
            help="Write the best bundle that encodes so many texts a second here to OUTPUT/chosen, such as 5000.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make faster forms of an encoder, and draw their texts a second against quality on your own texts.

    Each is a bundle with its own certificate, and is compared with the encoder on texts that were held out before
    anything was trained. A killed run goes on where it was; a candidate that fails is a line of the report. MiniLM and
    5,000 docstrings took 13 minutes on 2 cores, 4.8 GB of memory and 2.7 GB of disk for 20 points.
    """
    from export.tradeoff.build import Request, build  # for which --help does not wait

    if students and kinds and Kind.STUDENT not in kinds:
        raise InputError("--students would change nothing: add student to --candidates")
    for name, value, most in (("--max-loss", max_loss, 100), ("--min-speed", min_speed, 1e9)):
        if value is not None and not 0 <= value <= most:  # nor NaN
            raise InputError(f"{name} {value:g} is impossible: pass a number from 0 to {most:,.0f}")
    request = Request(
        encoder=encoder,
        texts=_read(corpus, column),
        output=output,
        kinds=tuple(kinds or Kind),
        students=tuple(students or ()),
        sets=tuple(found for path in sts or () for found in read_sets(path)),
        collections=tuple(map(read_retrieval, retrieval or ())),
        max_loss=max_loss,
        min_speed=min_speed,
    )
    console = Console(stderr=True, highlight=False, markup=False)  # names and reasons may hold brackets
    with truncations_counted_elsewhere(), _progress(console) as show:
        front = build(request, show)
    console.print(_table(front))
    for name, reason in front.failed.items():
        console.print(f"{name} failed: {reason}", style="red", soft_wrap=True)
    console.print(front.sentence, soft_wrap=True)
    result = {"report": str(output / "report.md"), "points": len(front.rows), "failed": dict(front.failed)}
    if front.choice is not None:
        row, reason = front.choice
        command = f"mirror serve {output / 'chosen'} --precision {row.point.precision.value}"
        command += f" --dimensions {row.point.dimensions}" if row.point.dimensions else ""
        console.print(f"chosen: {reason}\n  {command}", soft_wrap=True)
        result |= {"chosen": str(output / "chosen"), "point": row.point.name, "reason": reason, "command": command}
    print_json(result | dict(front.facts))


def _read(names: Sequence[str], column: str) -> tuple[str, ...]:
    """Read distinct texts, each on one line: every command takes such files."""
    found: dict[str, None] = {}
    for row in open_corpus(names, column).rows():
        text = row.values[0]
        if error := validate_text(0, text):
            raise InputError(f"{row.where}: {error.reason}")
        found[" ".join(str(text).split())] = None
    return tuple(filter(None, found))


@contextmanager
def _progress(console: Console) -> Iterator[OnProgress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note="")
            bar.update(tasks[stage], completed=done, note=note[-60:])

        yield show


def _table(front: Front) -> Table:
    from export.tradeoff.choose import HEAD

    table = Table(*HEAD, title=front.encoder)
    for row in front.rows:
        table.add_row(*row.shown)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    lists = {"--candidates": {kind.value for kind in Kind}, **dict.fromkeys(("--corpus", "--sts", "--retrieval"))}
    return run_command(application(run), argv, "front.py", lists={**lists, "--students": None})


if __name__ == "__main__":
    sys.exit(main())
