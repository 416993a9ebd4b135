"""Measure a bundle (speed, quality, serving, other libraries, the ceiling first) and the tuning of a model.

    python benchmarks/run.py BUNDLE --suite latency throughput --output reports/mine

Writes report.json, report.md and plots. The last line of standard output is one JSON object with the figures.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.load.perf_analyzer import NAME as PERF_ANALYZER
from benchmarks.machine.ceilings import SUITE as CEILINGS
from benchmarks.machine.ceilings import measure_ceilings
from benchmarks.machine.host import describe_run
from benchmarks.page import write_page
from benchmarks.peers.environments import parse_environments
from benchmarks.peers.specs import PEERS
from benchmarks.plan import Environments, Plan, Suite, packed_variants, read_shape, select_variants
from benchmarks.recorder import Recorder
from benchmarks.report.document import MARKDOWN_FILE, check_output, headline, write_folder
from benchmarks.report.facts import Facts, Settings, Subject
from benchmarks.report.record import PEOPLE
from benchmarks.report.storage import REPORT_FILE, Report, resumed_report, write_report
from benchmarks.suites.latency import run_latency
from benchmarks.suites.peers import prepare_peers, run_peers
from benchmarks.suites.quality import read_evaluation_sets, run_quality
from benchmarks.suites.serving import run_serving
from benchmarks.suites.startup import run_startup
from benchmarks.suites.throughput import run_throughput
from benchmarks.suites.training import TrainingPlan, run_training
from benchmarks.workload import Shape, bundle_tokenizer, load_workload
from mirror_runtime.bundle import TOKENIZER_FILE, EngineName, Pooling, Precision, read_manifest
from mirror_runtime.cli.run import application, run_command, truncations_counted_elsewhere
from mirror_runtime.errors import InputError
from mirror_runtime.pairs import check_has_vectors

ROOT = Path(__file__).resolve().parents[1]

SUITES: Mapping[Suite, Callable[[Plan, Recorder, Progress], None]] = {
    Suite.STARTUP: run_startup,
    Suite.LATENCY: run_latency,
    Suite.THROUGHPUT: run_throughput,
    Suite.QUALITY: run_quality,
    Suite.SERVING: run_serving,
    Suite.PEERS: run_peers,
    Suite.TRAINING: run_training,
}
"""In the order in which they run: what needs a quiet machine first, what loads it most last."""

NEED_CEILINGS = {Suite.LATENCY, Suite.THROUGHPUT, Suite.PEERS}

_LISTS: Mapping[str, tuple[str, ...] | None] = {
    "--suite": tuple(suite.value for suite in Suite),
    "--engine": tuple(engine.value for engine in EngineName),
    "--precision": tuple(precision.value for precision in Precision),
    "--peer": tuple(spec.title for spec in PEERS),
    **dict.fromkeys(("--sts", "--words", "--recipe")),
}


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    suite: Annotated[list[Suite] | None, typer.Option(help="One or several. Default: latency throughput.")] = None,
    output: Annotated[Path, typer.Option(help="Folder; an older report there is replaced.")] = Path("reports/latest"),
    texts: Annotated[Path | None, typer.Option(help="Workload, a text a line. Default: Python's docstrings.")] = None,
    shape: Annotated[Shape, typer.Option(help="Lines unchanged, or texts of 96-256 or 5-500 tokens.")] = Shape.LINES,
    quick: Annotated[bool, typer.Option("--quick", help="At most 300 texts, few samples: minutes on 2 cores.")] = False,
    engine: Annotated[list[EngineName] | None, typer.Option(help="Default: all in the bundle.")] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Default: all in the bundle.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of each party. Default: 5, or 2 with --quick.")] = None,
    seed: Annotated[int, typer.Option(help="Of the workload's sample, random arrivals and the intervals.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run of this --output.")] = False,
    peer: Annotated[list[str] | None, typer.Option(help="Libraries. Default: all; with --quick the fast.")] = None,
    peer_env: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="Of a peer or perf_analyzer.")] = None,
    env_dir: Annotated[Path, typer.Option(help="Where peers' environments are made, several GB.")] = ROOT / ".venvs",
    base: Annotated[Path | None, typer.Option(help="Suite training: folder of the masked language model.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Suite training: text to tune on, one per line.")] = None,
    sts: Annotated[list[Path] | None, typer.Option(help="Quality and training: sentence similarity sets.")] = None,
    words: Annotated[list[Path] | None, typer.Option(help="Quality and training: word similarity sets.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Suite training: of tune.py. Default: sentence.")] = None,
    pooling: Annotated[Pooling, typer.Option(help="Suite training: mean or cls.")] = Pooling.MEAN,
    training_seeds: Annotated[int | None, typer.Option(min=1, help="Of our recipes. Default: 3; quick: 1.")] = None,
    reference_seeds: Annotated[int, typer.Option(min=0, help="Runs of the published recipe; 0 for none.")] = 1,
    page: Annotated[bool, typer.Option("--page", help="Also write report.html, one page without network.")] = False,
) -> None:
    """Measure BUNDLE and write a report."""
    check_output(output)
    suites = tuple(dict.fromkeys(suite or (Suite.LATENCY, Suite.THROUGHPUT)))
    tuning = None
    if Suite.TRAINING in suites:
        if base is None or corpus is None:
            raise InputError("suite training needs --base and --corpus")
        tuning = TrainingPlan(
            base=base, corpus=corpus, sts=tuple(sts or ()), words=tuple(words or ()), pooling=pooling, quick=quick,
            recipes=tuple(recipe or ("sentence",)), seeds=training_seeds or (1 if quick else 3),
            reference_seeds=reference_seeds,
        )  # fmt: skip
    peers = _chosen_peers(peer or [], quick=quick) if Suite.PEERS in suites else ()
    known = {PERF_ANALYZER, *(spec.name for spec in PEERS)}
    environments = Environments(given=parse_environments(peer_env or [], "--peer-env", known), folder=env_dir)
    manifest = read_manifest(bundle)
    check_has_vectors(manifest.encoder)
    tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, manifest.encoder.max_tokens)
    sets = read_evaluation_sets(sts or (), words or (), quick=quick) if Suite.QUALITY in suites else ()
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as scratch:
        plan = Plan(
            bundle=bundle, manifest=manifest, variants=select_variants(manifest, engine or (), precision or ()),
            workload=load_workload(texts, tokenizer, quick=quick, seed=seed, shape=shape), suites=suites,
            rounds=rounds or (2 if quick else 5), seed=seed, quick=quick, sets=sets, peers=peers, training=tuning,
            shape=read_shape(bundle), environments=environments, scratch=Path(scratch),
        )  # fmt: skip
        execute(plan, output, resume=resume, page=page)


def execute(plan: Plan, output: Path, *, resume: bool, page: bool) -> None:
    """Measure, and write the report; exit with status 130 when interrupted, 1 when nothing could be measured."""
    began = time.perf_counter()
    unfinished = Path(f"{output.absolute()}.unfinished")
    before = (resume_run if resume else start_run)(unfinished, describe(plan))
    recorder, console = Recorder(before.measurements), Console(stderr=True)
    finished = {one.suite for one in before.measurements}
    recorder.failures += [failure for failure in before.failures if failure.suite in finished]

    def so_far(*, partial: bool) -> Report:
        facts = replace(before.facts, partial=partial, wall_s=before.facts.wall_s + time.perf_counter() - began)
        return Report(facts=facts, measurements=recorder.measurements, failures=tuple(recorder.failures))

    partial = False
    try:
        with _interruptible(), _progress(console) as progress, truncations_counted_elsewhere():
            for _ in measure(plan, finished, recorder, progress):
                write_report(so_far(partial=True), unfinished / REPORT_FILE)
    except KeyboardInterrupt:
        partial = True
    report = so_far(partial=partial)
    write_folder(report, output)
    if page:
        write_page(report, output)
    if not partial:
        shutil.rmtree(unfinished)
    for failure in report.failures:
        console.print(f"not measured: {failure.suite}, {failure.party}: {failure.reason}", markup=False)
    state = "interrupted: partial report" if partial else "report"
    console.print(f"{state} in {output / MARKDOWN_FILE}", markup=False)
    sys.stdout.write(json.dumps(headline(report, output), allow_nan=False) + "\n")
    own = ("bundle", CEILINGS)  # measurements beside those of the suites
    if partial or all(one.suite in own or one.party == PEOPLE for one in report.measurements):
        raise typer.Exit(130 if partial else 1)


def start_run(unfinished: Path, facts: Facts) -> Report:
    """Begin a run whose finished suites are a report in `unfinished`; what an interrupted one left is deleted."""
    if unfinished.exists():
        if not (unfinished / REPORT_FILE).is_file():
            raise InputError(f"{unfinished} has no {REPORT_FILE} and is not replaced: choose another --output")
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    report = Report(facts=facts, measurements=(), failures=())
    write_report(report, unfinished / REPORT_FILE)
    return report


def resume_run(unfinished: Path, facts: Facts) -> Report:
    """Return what the interrupted run finished; see `resumed_report`."""
    if not (unfinished / REPORT_FILE).is_file():
        raise InputError(f"--resume: {unfinished} has no {REPORT_FILE}: leave the option out to start anew")
    return resumed_report(unfinished, facts)


def measure(plan: Plan, finished: Set[str], recorder: Recorder, progress: Progress) -> Iterator[None]:
    """Run the plan's suites but for the finished ones; yield when another is done."""
    for variant in plan.variants:
        recorder.record("bundle", variant.name, "worst cosine of export", variant.parity.min_cosine)
        recorder.record("bundle", variant.name, "mean cosine of export", variant.parity.mean_cosine)
    left = [suite for suite in SUITES if suite in plan.suites and suite.value not in finished]
    if plan.peers and {Suite.PEERS, Suite.STARTUP} & set(left):
        plan = prepare_peers(plan, recorder, progress)
    if NEED_CEILINGS & set(left) and CEILINGS not in finished:
        measure_ceilings(plan, recorder, progress)
        yield
    for suite in left:
        SUITES[suite](plan, recorder, progress)
        yield


def describe(plan: Plan) -> Facts:
    """Return the facts of a run that begins now."""
    spec = plan.manifest.encoder
    subject = Subject(
        name=plan.bundle.resolve().name, fingerprint=plan.manifest.fingerprint, base_model=spec.base_model,
        max_tokens=spec.max_tokens, dim=spec.dim,
        artifacts=tuple(variant.name for variant in packed_variants(plan.manifest)),
        flop_per_token=None if plan.shape is None else plan.shape.flop_per_token,
    )  # fmt: skip
    settings = Settings(
        suites=tuple(suite.value for suite in plan.suites), variants=tuple(variant.name for variant in plan.variants),
        peers=plan.peers, sets_sha256=tuple(one.sha256 for one in plan.sets),
        training=None if plan.training is None else plan.training.describe(),
        quick=plan.quick, rounds=plan.rounds, seed=plan.seed,
    )  # fmt: skip
    return describe_run(subject, plan.workload.facts, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 on success, 1 when nothing could be measured, 2 on a user error, 130 when interrupted."""
    return run_command(application(run), argv, "benchmarks/run.py", lists=_LISTS)


def _chosen_peers(titles: Sequence[str], *, quick: bool) -> tuple[str, ...]:
    """Return the named peers, in any case; without names all, or those that a quick run takes."""
    known = {spec.title.lower(): spec for spec in PEERS}
    named = {title.lower() for title in titles}
    if unknown := sorted(named - known.keys()):
        raise InputError(f"--peer {unknown[0]}: must be one of {', '.join(spec.title for spec in PEERS)}")
    chosen = named or {name for name, spec in known.items() if spec.quick or not quick}
    return tuple(spec.title for name, spec in known.items() if name in chosen)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM end a run as Ctrl-C does, and SIGINT too where a background shell has it ignored."""
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        yield


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:22}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[doing]}"))
    return Progress(*columns, *left, console=console)


if __name__ == "__main__":
    sys.exit(main())
