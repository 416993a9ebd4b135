"""Measure encoders on labelled sets and on the user's own texts: the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from evaluation.bias import evaluate_association, read_association_test
from evaluation.evalrank import evaluate_rank
from evaluation.labels import evaluate_clusters, evaluate_labels, read_labelled
from evaluation.phrases import evaluate_choices, read_choices
from evaluation.plot import draw
from evaluation.probes import evaluate_probes
from evaluation.retrieval import bm25, evaluate_retrieval, read_retrieval, score
from evaluation.robustness import evaluate_robustness
from evaluation.served import is_served, open_served
from evaluation.sets import EvaluationSet, read_sets
from evaluation.similarity import AGGREGATION, CLOSE, GEOMETRY, Group, Report, Task, difference, evaluate
from evaluation.statistics import Bootstrap, flat
from evaluation.vectors import Encode
from mirror_runtime.bundle import EncoderSpec, Pooling
from mirror_runtime.cli.options import PoolingOption, RevisionOption
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError
from mirror_runtime.folders import replace_file
from training.own import own_probes

LISTS = ("--sts", "--words", "--phrases", "--retrieval", "--classify", "--cluster", "--bias", "--own")

LEGEND = {
    "nDCG": "nDCG@10: how high and how well judged the first ten documents are. MRR@10: mean of 1 / rank of the first "
    "relevant one. recall@100: share of the relevant ones among the first hundred.",
    "acc@": "acc@k: the answer is among the k nearest of all names.",
    "hits@": "hits@k: a text's paraphrase is among the k nearest of all texts of the set; MRR: mean of 1 / rank.",
    "effect size": "effect size: by how many deviations target1 is nearer to attribute1 than target2 is (0: no bias); "
    "p-value: share of splits of the targets that are as far.",
    "v-measure": "v-measure: do clusters find the labels?",
    "lost": "Spearman lost: what changing all texts costs, less is better; cosine: of text and changed text.",
    "content, acc": "content: share of your texts that are nearer to their content words alone than to themselves with "
    "the rarest word replaced.",
    ", MRR": "MRR: a text of yours looked for by a part or a changed form of it, mean of 1 / rank among all.",
}
"""What a metric means, by a part of its name."""


def command(
    *,
    encoders: Annotated[
        list[str],
        typer.Argument(
            metavar="ENCODER...",
            help="Folders or hub names (PyTorch, fp32), BUNDLE or BUNDLE:PRECISION, http://HOST:PORT/v1#MODEL, "
            "triton://HOST:PORT/MODEL. The others are compared with the first.",
        ),
    ],
    sts: Annotated[list[str] | None, typer.Option(help="Sentence similarity sets: files or folders.")] = None,
    words: Annotated[list[str] | None, typer.Option(help="Word similarity sets: files, or MULTISIMLEX:ENG.")] = None,
    phrases: Annotated[
        list[str] | None,
        typer.Option(
            help="Phrase files: scored pairs (BiRD), `bigram<TAB>answer<TAB>distractors` (Turney), or "
            "`name<TAB>synonym`."
        ),
    ] = None,
    retrieval: Annotated[
        list[str] | None, typer.Option(help="BEIR folders: corpus.jsonl, queries.jsonl, qrels/test.tsv.")
    ] = None,
    classify: Annotated[
        list[str] | None,
        typer.Option(
            help="`label<TAB>text` files: logistic regression, 10 folds, or on X-test.tsv beside X-train.tsv."
        ),
    ] = None,
    cluster: Annotated[list[str] | None, typer.Option(help="`label<TAB>text` files, clustered by k-means.")] = None,
    bias: Annotated[
        list[str] | None,
        typer.Option(
            help="`list<TAB>text` files of the lists target1, target2, attribute1, attribute2: WEAT of words, SEAT "
            "of sentences."
        ),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(
            help="Your own texts, no labels: lines, pairs, or .jsonl with title and text. Several files are one "
            "corpus. Uses what tune.py holds out of the same files."
        ),
    ] = None,
    robust: Annotated[
        bool, typer.Option("--robust", help="Also measure what typos, capitals, white space and order cost on --sts.")
    ] = False,
    rank: Annotated[
        bool, typer.Option("--rank", help="Also find each text's paraphrase among all texts of --sts (EvalRank).")
    ] = False,
    pooling: PoolingOption = None,
    revision: RevisionOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Truncate texts to this many tokens. Default: each encoder's own limit.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap for the 95 % intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap, folds, clusters and changed texts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the report to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw all figures with their intervals into this PNG.")] = None,
) -> None:
    """Measure encoders on labelled sets, and on your own texts without labels; 95 % intervals, paired differences.

    A set's parts are put together and ranked at once ("all"). The last line of stdout is one JSON object.
    """
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot is {plot}: its name must end in .png")
    for path in filter(None, (output, plot)):
        _check_output(path)
    _check_served(encoders, {"--pooling": pooling, "--revision": revision}, max_tokens)
    collections = [read_retrieval(path) for path in retrieval or []]
    labelled = [(evaluate_labels, read_labelled(path)) for path in classify or []]
    labelled += [(evaluate_clusters, read_labelled(path)) for path in cluster or []]
    choices = {path: read_choices(path) for path in phrases or []}
    sets = load_sets(sts or [], words or [], [path for path, found in choices.items() if found is None])
    tasks: list[Task] = [partial(evaluate_retrieval, one) for one in collections]
    tasks += [partial(evaluate_choices, one) for one in choices.values() if one is not None]
    tasks += [partial(measure, one) for measure, one in labelled]
    tasks += [partial(evaluate_association, read_association_test(path)) for path in bias or []]
    tasks += [partial(evaluate_rank, one) for one in sets[Group.STS] if rank]
    tasks += [partial(evaluate_robustness, one) for one in sets[Group.STS] if robust]
    if own:
        name = "+".join(Path(path).stem for path in own)
        tasks.append(partial(evaluate_probes, own_probes(own, encoders), name=name))
    if not any(sets.values()) and not tasks:
        raise InputError("nothing to evaluate on: pass --sts, --words or another option that names files")
    bootstrap = Bootstrap(resamples=resamples, seed=seed)
    console = Console(stderr=True, markup=False)
    reports = []
    for name in encoders:
        with ExitStack() as around:
            encode, spec = open_served(name, around) or _load(name, revision, pooling, max_tokens)
            on_progress = around.enter_context(_progress(name, console))
            reports.append(
                evaluate(encode, sets, spec=spec, tasks=tasks, name=name, bootstrap=bootstrap, on_progress=on_progress)
            )
    show(reports, console)
    yardsticks = [result for one in collections for result in score(one, bm25(one), bootstrap)]
    for result in yardsticks:
        console.print(f"BM25 on {result.set}: {result.metric} {result.figure}")
    report = json.dumps(as_json(reports) | {"bm25": [one.to_json() for one in yardsticks]}, ensure_ascii=False)
    sys.stdout.write(report + "\n")  # first: a full disk must not lose it
    sys.stdout.flush()
    if output is not None:
        _write(output, report)
    if plot is not None:
        draw(_with_short_names(reports), yardsticks, plot)


def load_sets(
    sts: Sequence[str], words: Sequence[str], phrases: Sequence[str] = ()
) -> dict[Group, list[EvaluationSet]]:
    """Read sets of scored pairs by group."""
    files = {Group.STS: sts, Group.WORDS: words, Group.PHRASES: phrases}
    return {group: [one for path in paths for one in read_sets(path)] for group, paths in files.items()}


def _load(
    name: str, revision: str | None, pooling: Pooling | None, max_tokens: int | None
) -> tuple[Encode, EncoderSpec]:
    from encoders.reference import Reference  # imports torch
    from encoders.source import resolve

    source = resolve(name, revision=revision, pooling=pooling, max_tokens=max_tokens)
    return Reference.load(source).encode_unnormalized, source.spec


@contextmanager
def _progress(name: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


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
                "tasks": [
                    result.to_json() | flat("value", figure)
                    for result, figure in zip(other.tasks, change.tasks, strict=True)
                ],
            }
        )
    return {"encoders": [report.to_json() for report in reports], "differences": changes}


def show(reports: Sequence[Report], console: Console) -> None:
    """Print all figures side by side, then the geometry of each encoder's vectors."""
    reports = _with_short_names(reports)
    console.print(_figures(reports))
    for report in reports:
        if report.results:
            console.print(_geometry(report))


def _with_short_names(reports: Sequence[Report]) -> Sequence[Report]:
    short = [Path(report.encoder).name for report in reports]
    if len(set(short)) < len(short):
        return reports
    return [dataclasses.replace(report, encoder=name) for report, name in zip(reports, short, strict=True)]


def _figures(reports: Sequence[Report]) -> Table:
    first = reports[0]
    names = {result.metric for result in first.tasks}
    notes = [f"Aggregation {AGGREGATION}."] if first.results else []
    notes += [text for word, text in LEGEND.items() if any(word in name for name in names)]
    table = Table(title="Figures × 100 [95 % interval]", caption=" ".join(notes), title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("of", justify="right")
    labels = [report.label for report in reports]
    for name in (*labels, *(f"{label} – {labels[0]}" for label in labels[1:])):
        table.add_column(name, justify="right")
    changes = [difference(first, other) for other in reports[1:]]
    for i, result in enumerate(first.results):
        figures = [str(report.results[i].spearman) for report in reports]
        gained = (f"{change.sets[i]:+}" for change in changes)
        table.add_row(f"{result.name}, Spearman", f"{result.pairs:,}", *figures, *gained)
    table.add_section()
    for group in first.means:
        figures = [str(report.means[group]) for report in reports]
        count = sum(result.group is group for result in first.results)
        gained = (f"{change.means[group]:+}" for change in changes)
        table.add_row(f"mean of {count} {group.value}", "", *figures, *gained)
    table.add_section()
    for i, task in enumerate(first.tasks):
        figures = [str(report.tasks[i].figure) for report in reports]
        table.add_row(
            f"{task.set}, {task.metric}", f"{task.samples:,}", *figures, *(f"{c.tasks[i]:+}" for c in changes)
        )
    return table


def _geometry(report: Report) -> Table:
    table = Table(
        title=f"Geometry of the vectors of {report.label}",
        caption=f"Alignment: pairs scored at least {CLOSE:.0%} of the highest score; IS: isotropy; MVN: length of "
        "the mean vector; rank: effective rank. Lower is better, except for IS and rank.",
        title_justify="left",
    )
    table.add_column("set")
    for name in GEOMETRY:
        table.add_column(name, justify="right")
    for result in report.results:
        table.add_row(result.name, *("–" if value is None else f"{value:.3f}" for value in result.geometry))
    return table


def _check_served(encoders: Sequence[str], head: Mapping[str, str | None], max_tokens: int | None) -> None:
    """Check before the work that no option is ignored; `--pooling` may be for a plain base beside a bundle."""
    served = [name for name in encoders if is_served(name)]
    if served and max_tokens is not None:
        raise InputError(f"--max-tokens cannot change the limit of {served[0]}: leave one of them out")
    for option, value in head.items() if len(served) == len(encoders) else ():
        if value is not None:
            raise InputError(f"{option} is for folders and hub names, and {served[0]} has its own: leave it out")


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
    return run_command(application(command), argv, "evaluate.py", lists=dict.fromkeys(LISTS))


if __name__ == "__main__":
    sys.exit(main())
