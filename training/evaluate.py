"""Measure encoders on similarity sets: the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from encoders.reference import Reference
from encoders.source import resolve
from evaluation.sets import EvaluationSet, read_sets
from evaluation.similarity import AGGREGATION, CLOSE, Group, Report, difference, evaluate, flat
from mirror_runtime.cli.options import PoolingOption, RevisionOption
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError
from mirror_runtime.folders import replace_file


def command(
    *,
    encoders: Annotated[
        list[str],
        typer.Argument(metavar="ENCODER...", help="Folders or hub names. The others are compared with the first."),
    ],
    sts: Annotated[list[str] | None, typer.Option(help="Sentence similarity sets: files or folders.")] = None,
    words: Annotated[list[str] | None, typer.Option(help="Word similarity sets: files, or MULTISIMLEX:ENG.")] = None,
    pooling: PoolingOption = None,
    revision: RevisionOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Truncate texts to this many tokens. Default: each encoder's own limit.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap for the 95 % intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
) -> None:
    """Compare cosines with human scores: Spearman times 100 per set with a 95 % interval, and the plain mean.

    A set's parts are put together and ranked at once ("all"). Vectors come from the PyTorch reference, in fp32. The
    last line of stdout is one JSON object.
    """
    if output is not None:
        _check_output(output)
    sets = load_sets(sts or [], words or [])
    sources = [resolve(name, revision=revision, pooling=pooling, max_tokens=max_tokens) for name in encoders]
    console = Console(stderr=True, markup=False)
    reports = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name, source in zip(encoders, sources, strict=True):
            task = progress.add_task(name, total=None)

            def on_progress(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            encode, spec = Reference.load(source).encode_unnormalized, source.spec
            reports.append(
                evaluate(encode, sets, spec=spec, name=name, resamples=resamples, seed=seed, on_progress=on_progress)
            )
    show(reports, console)
    report = json.dumps(as_json(reports), ensure_ascii=False)
    if output is not None:
        _write(output, report)
    sys.stdout.write(report + "\n")


def load_sets(sts: Sequence[str], words: Sequence[str]) -> dict[Group, list[EvaluationSet]]:
    """Read evaluation sets by group."""
    if not sts and not words:
        raise InputError("nothing to evaluate on: pass --sts or --words files")
    files = {Group.STS: sts, Group.WORDS: words}
    return {group: [one for path in paths for one in read_sets(path)] for group, paths in files.items()}


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """Return all reports, and each encoder's differences to the first, as JSON values."""
    changes = []
    for other in reports[1:]:
        change = difference(reports[0], other)
        sets = zip(other.results, change.sets, strict=True)
        changes.append(
            {
                "encoder": other.encoder,
                "over": reports[0].encoder,
                "sets": [{"name": result.name} | flat("spearman", figure) for result, figure in sets],
                "means": {group.value: flat("mean", figure) for group, figure in change.means.items()},
            }
        )
    return {"encoders": [report.to_json() for report in reports], "differences": changes}


def show(reports: Sequence[Report], console: Console) -> None:
    """Print the correlations side by side, then the geometry of each encoder's vectors."""
    short = [Path(report.encoder).name for report in reports]
    names = short if len(set(short)) == len(short) else [report.encoder for report in reports]
    labels = [f"{name} ({report.spec.pooling.value})" for name, report in zip(names, reports, strict=True)]
    console.print(_correlations(reports, labels))
    for report, label in zip(reports, labels, strict=True):
        console.print(_geometry(report, label))


def _correlations(reports: Sequence[Report], labels: Sequence[str]) -> Table:
    table = Table(title="Spearman × 100 [95 % interval]", caption=f"Aggregation {AGGREGATION}.", title_justify="left")
    table.add_column("set")
    table.add_column("pairs", justify="right")
    for name in (*labels, *(f"{label} – {labels[0]}" for label in labels[1:])):
        table.add_column(name, justify="right")
    changes = [difference(reports[0], other) for other in reports[1:]]
    for i, result in enumerate(reports[0].results):
        figures = [str(report.results[i].spearman) for report in reports]
        table.add_row(result.name, f"{result.pairs:,}", *figures, *(f"{change.sets[i]:+}" for change in changes))
    table.add_section()
    for group in reports[0].means:
        figures = [str(report.means[group]) for report in reports]
        count = sum(result.group is group for result in reports[0].results)
        table.add_row(
            f"mean of {count} {group.value}", "", *figures, *(f"{change.means[group]:+}" for change in changes)
        )
    return table


def _geometry(report: Report, label: str) -> Table:
    table = Table(
        title=f"Geometry of the vectors of {label}",
        caption=f"Alignment: pairs scored at least {CLOSE:.0%} of the highest score. Lower is better, except for IS.",
        title_justify="left",
    )
    table.add_column("set")
    for name in ("alignment", "uniformity", "anisotropy", "IS", "MVN"):
        table.add_column(name, justify="right")
    for result in report.results:
        table.add_row(result.name, *("–" if value is None else f"{value:.3f}" for value in result.geometry))
    return table


def _check_output(path: Path) -> None:
    """Check before the work that the report can be written after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: choose a file in a writable folder")


def _write(path: Path, text: str) -> None:
    with replace_file(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 if the input cannot be used."""
    return run_command(application(command), argv, "evaluate.py", lists={"--sts": None, "--words": None})


if __name__ == "__main__":
    sys.exit(main())
