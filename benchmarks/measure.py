"""The order in which suites run: what needs a quiet machine first, what fills it last."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from benchmarks.ceilings import EncoderShape, measure_ceilings
from benchmarks.latency import run_latency
from benchmarks.peer_specs import PeerPoint
from benchmarks.peer_suite import peer_starters, prepare_peers, run_peers
from benchmarks.perf_analyzer import NAME as PERF_ANALYZER
from benchmarks.perf_analyzer import find_perf_analyzer
from benchmarks.quality import Judge, run_quality
from benchmarks.results import Suite
from benchmarks.scaling import run_scaling
from benchmarks.serving import run_serving
from benchmarks.session import Plan, Results, Runner, loaded
from benchmarks.startup import our_starters, run_startup
from benchmarks.throughput import run_lengths, run_throughput
from benchmarks.training_suite import TrainingPlan, run_training
from mirror_runtime.errors import InputError, PeerError


@dataclass(frozen=True, kw_only=True)
class Environments:
    """Where other libraries live.

    Attributes:
        given: environments that the caller made, by name.
        folder: where the others are made.
    """

    given: Mapping[str, Path]
    folder: Path


def measure(
    plan: Plan,
    shape: EncoderShape | None,
    tuning: TrainingPlan | None,
    environments: Environments,
    results: Results,
    progress: Progress,
) -> None:
    """Run the plan's suites; `results` holds what is finished at any time."""
    wanted = {suite for suite in plan.suites if not results.has(suite.value)}
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as scratch:
        peers: list[PeerPoint] = []
        if Suite.PEERS in wanted:
            peers = prepare_peers(plan, environments.given, environments.folder, Path(scratch), results, progress)
        if shape is not None and wanted & {Suite.LATENCY, Suite.THROUGHPUT, Suite.PEERS}:
            measure_ceilings(plan, shape, results, progress)
        if Suite.STARTUP in wanted:
            run_startup(plan, [*our_starters(plan), *peer_starters(peers, results)], results, progress)
        if Suite.SCALING in wanted:
            run_scaling(plan, results, progress)
        if set(plan.suites) - {Suite.STARTUP, Suite.SCALING, Suite.TRAINING}:
            with loaded(plan, results) as runners:
                _measure_loaded(plan, runners, shape, peers, environments, results, progress)
    if tuning is not None:
        run_training(tuning, results, progress)


def _measure_loaded(
    plan: Plan,
    runners: Sequence[Runner],
    shape: EncoderShape | None,
    peers: Sequence[PeerPoint],
    environments: Environments,
    results: Results,
    progress: Progress,
) -> None:
    if Suite.LATENCY in plan.suites:
        try:
            run_latency(plan, runners, shape, results, progress)
        except InputError as error:  # too few words for texts of exact lengths: the other suites do not need them
            results.fail(Suite.LATENCY.value, "all", error)
    if Suite.THROUGHPUT in plan.suites:
        run_throughput(plan, runners, shape, results, progress)
        try:
            run_lengths(plan, runners, results, progress)
        except InputError as error:
            results.fail(Suite.THROUGHPUT.value, "by length", error)
    judge = None
    if Suite.QUALITY in plan.suites:
        judge = Judge(plan.sets, seed=plan.seed)
        run_quality(plan, runners, judge, results, progress)
    if Suite.SERVING in plan.suites:
        run_serving(plan, runners, _analyzer(environments, results, progress), results, progress)
    if Suite.PEERS in plan.suites:
        run_peers(plan, runners, peers, judge, results, progress)


def _analyzer(environments: Environments, results: Results, progress: Progress) -> Path | None:
    if results.has(Suite.SERVING.value):
        return None
    try:
        return find_perf_analyzer(
            environments.given.get(PERF_ANALYZER),
            environments.folder,
            lambda line: progress.console.print(line, style="dim", markup=False),
        )
    except (PeerError, OSError) as error:
        results.fail(Suite.SERVING.value, PERF_ANALYZER, error)
        return None
