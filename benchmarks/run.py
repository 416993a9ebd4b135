"""Measure a bundle (speed, quality, serving, other libraries, the ceiling first) and the tuning of a model.

    python benchmarks/run.py BUNDLE --suite latency throughput --output reports/mine

Writes report.json, report.md and plots. The last line of standard output is one JSON object with the figures.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.ceilings import EncoderShape, read_shape
from benchmarks.evalsets import read_evaluation_sets
from benchmarks.host import describe_host, describe_source, installed_versions
from benchmarks.measure import Environments, measure
from benchmarks.peer_specs import PEERS
from benchmarks.perf_analyzer import NAME as PERF_ANALYZER
from benchmarks.report import MARKDOWN_FILE, build_report, check_output, headline, write_report
from benchmarks.results import Suite
from benchmarks.resume import read_interrupted, restore
from benchmarks.session import Plan, Results, select_points
from benchmarks.training_suite import TrainingPlan
from benchmarks.workload import Shape, bundle_tokenizer, load_workload
from mirror_runtime.bundle import TOKENIZER_FILE, EngineName, Pooling, Precision, read_manifest
from mirror_runtime.cli.run import application, run_command, truncations_counted_elsewhere
from mirror_runtime.errors import BundleError, InputError

ROOT = Path(__file__).resolve().parents[1]
FULL_ROUNDS = 5
QUICK_ROUNDS = 2
TRAINING_SEEDS = 3

_LISTS: Mapping[str, tuple[str, ...] | None] = {
    "--suite": tuple(suite.value for suite in Suite),
    "--engine": tuple(engine.value for engine in EngineName),
    "--precision": tuple(precision.value for precision in Precision),
    "--peer": tuple(spec.title for spec in PEERS),
    "--sts": None,
    "--words": None,
    "--recipe": None,
}


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    suite: Annotated[list[Suite] | None, typer.Option(help="One or several. Default: latency throughput.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the report; an older report there is replaced.")] = Path(
        "reports/latest"
    ),
    texts: Annotated[
        Path | None, typer.Option(help="Workload, one text a line. Default: docstrings of the standard library.")
    ] = None,
    shape: Annotated[
        Shape, typer.Option(help="Lengths of the texts: lines as they are, 96 to 256 tokens, or 5 to 500.")
    ] = Shape.LINES,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 300 texts, few samples: all suites in under 5 minutes on 2 cores.")
    ] = False,
    engine: Annotated[list[EngineName] | None, typer.Option(help="Default: all in the bundle.")] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Default: all in the bundle.")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="How often parties take turns. Default: 5, or 2 with --quick. Startup: at least 5 (1)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the workload's sample, random arrivals and the intervals.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run whose partial report is in --output.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Suite peers: which libraries. Default: all; with --quick those that convert nothing and load soon."
        ),
    ] = None,
    peer_env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="Use this virtual environment for a peer or perf_analyzer."),
    ] = None,
    env_dir: Annotated[
        Path, typer.Option(help="Where peers' environments are made (several GB; kept for the next run).")
    ] = ROOT / ".venvs",
    base: Annotated[Path | None, typer.Option(help="Suite training: folder of the masked language model.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Suite training: text to tune on, one a line.")] = None,
    sts: Annotated[list[Path] | None, typer.Option(help="Quality and training: sentence similarity sets.")] = None,
    words: Annotated[list[Path] | None, typer.Option(help="Quality and training: word similarity sets.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Suite training: of tune.py. Default: sentence.")] = None,
    pooling: Annotated[Pooling, typer.Option(help="Suite training: mean or cls.")] = Pooling.MEAN,
    training_seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Suite training: runs of each of our recipes. Default: 3, or 1 with --quick."),
    ] = None,
    reference_seeds: Annotated[
        int, typer.Option(min=0, help="Suite training: runs of the published recipe, minutes each; 0 leaves it out.")
    ] = 1,
    planted_slowdown: Annotated[
        float,
        typer.Option(min=0.0, help="For benchmarks/trust.py: let each engine run take longer by this share, 0.15."),
    ] = 0.0,
) -> None:
    """Measure BUNDLE and write a report."""
    started, began = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    check_output(output)
    suites = tuple(dict.fromkeys(suite or (Suite.LATENCY, Suite.THROUGHPUT)))
    environments = Environments(given=_given_environments(peer_env or []), folder=env_dir)
    tuning = None
    if Suite.TRAINING in suites:
        if base is None or corpus is None:
            raise InputError("suite training needs --base and --corpus")
        tuning = TrainingPlan(
            base=base,
            corpus=corpus,
            sts=tuple(sts or ()),
            words=tuple(words or ()),
            pooling=pooling,
            recipes=tuple(recipe or ("sentence",)),
            seeds=training_seeds or (1 if quick else TRAINING_SEEDS),
            reference_seeds=reference_seeds,
            quick=quick,
        )
    host, versions, source = describe_host(), installed_versions(), describe_source(ROOT)
    peers = _chosen_peers(peer or [], quick=quick) if Suite.PEERS in suites else ()
    sets = read_evaluation_sets(sts or [], words or [], quick=quick) if Suite.QUALITY in suites else ()
    manifest = read_manifest(bundle)
    points = select_points(manifest, engine or [], precision or [])
    tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, manifest.encoder.max_tokens)
    sizes, shapeless = _shape(bundle)
    plan = Plan(
        bundle=bundle,
        manifest=manifest,
        points=points,
        workload=load_workload(texts, tokenizer, quick=quick, seed=seed, shape=shape),
        suites=suites,
        peers=peers,
        sets=sets,
        training=None if tuning is None else tuning.describe(),
        quick=quick,
        rounds=rounds or (QUICK_ROUNDS if quick else FULL_ROUNDS),
        seed=seed,
        flop_per_token=None if sizes is None else sizes.flop_per_token,
        planted_slowdown=planted_slowdown,
    )
    results, spent_s = Results(), 0.0
    resumed: tuple[str, ...] = ()
    if resume:
        before = read_interrupted(output, plan, host=host, versions=versions, source=source)
        results, resumed, spent_s = restore(before), (*before.resumed, started), before.wall_s
        started = before.started
    if shapeless is not None:
        results.fail("ceilings", "all", shapeless)
    console = Console(stderr=True)
    partial = False
    try:
        with _interruptible(), _progress(console) as progress, truncations_counted_elsewhere():
            measure(plan, sizes, tuning, environments, results, progress)
    except KeyboardInterrupt:
        partial = True
    report = build_report(
        plan,
        results,
        host=host,
        versions=versions,
        source=source,
        started=started,
        resumed=resumed,
        wall_s=spent_s + time.perf_counter() - began,
        partial=partial,
    )
    write_report(report, output)
    for failure in report.failures:
        console.print(f"not measured: {failure.suite}, {failure.party}: {failure.reason}", markup=False)
    console.print(f"{'interrupted: partial report' if partial else 'report'} in {output / MARKDOWN_FILE}", markup=False)
    sys.stdout.write(json.dumps(headline(report, output), allow_nan=False) + "\n")
    if partial or not report.measured:
        raise typer.Exit(130 if partial else 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, 1 when nothing could be measured, 2 on a mistake of the caller's, 130 when interrupted.
    """
    return run_command(application(run), argv, "benchmarks/run.py", lists=_LISTS)


def _shape(bundle: Path) -> tuple[EncoderShape | None, BundleError | None]:
    """Give the encoder's sizes, or why they are unknown."""
    try:
        return read_shape(bundle), None
    except BundleError as error:
        return None, error


def _chosen_peers(titles: Sequence[str], *, quick: bool) -> tuple[str, ...]:
    """Give the peers that were asked for, in any case; else all, or those that a quick run takes."""
    known = {spec.title.lower(): spec.title for spec in PEERS}
    if unknown := [title for title in titles if title.lower() not in known]:
        raise InputError(f"--peer {unknown[0]}: known are {', '.join(known.values())}")
    if not titles:
        return tuple(spec.title for spec in PEERS if not quick or spec.quick)
    asked = {title.lower() for title in titles}
    return tuple(title for name, title in known.items() if name in asked)


def _given_environments(pairs: Sequence[str]) -> dict[str, Path]:
    known = [*(spec.name for spec in PEERS), PERF_ANALYZER]
    given = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if name not in known or not folder:
            raise InputError(f"--peer-env {pair!r}: write NAME=DIR with NAME one of {', '.join(known)}")
        given[name] = Path(folder)
    return given


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, and SIGINT too where a shell had it ignored: in the background."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[doing]}"),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
