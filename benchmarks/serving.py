"""Suite `serving`: artifacts behind the real Triton and the gateway on loopback, as much as they can do and more."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.progress import Progress

from benchmarks.gateway import running_gateway
from benchmarks.load import Load, closed_loop, requests_of
from benchmarks.overload import run_overload
from benchmarks.perf_analyzer import NAME as PERF_ANALYZER
from benchmarks.perf_analyzer import run_perf_analyzer
from benchmarks.served import Served
from benchmarks.serving_results import GATEWAY, GRPC, ServingResult
from benchmarks.session import Plan, Results, Runner, steps
from benchmarks.turns import Turns
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import EngineError, MirrorError, PeerError, ServerError
from mirror_runtime.selection import AUTO, choose
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from mirror_runtime.triton.server.server import Server

LOOPS = ((1, 1), (8, 1), (32, 1), (4, 32))
"""Callers and texts a request."""

GATEWAY_LOOPS = ((8, 1), (32, 1), (4, 32))
"""Of these, what is asked of the gateway."""

REFERENCE_LOOP = (32, 1)
"""Its rate is what the open loop's rates are shares of."""

FULL_SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
QUICK_SHARES = (0.5, 0.9, 1.2)
MOST_TEXTS = 2000
"""Of the workload, for a pass in process and for the callers to go round."""

OVERLOAD_S = 60.0
QUICK_OVERLOAD_S = 5.0
"""A small encoder on two cores takes what comes for about three seconds before it refuses: in less there would be
nothing to see."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long each part takes, in seconds.

    Attributes:
        closed_s: a round of a closed loop.
        open_s: a rate of the open loop.
        window_s: a window of perf_analyzer's.
        shares: rates of the open loop, of the reference loop's.
        calm_s: each of the two measures before the overload.
        overload_s: the overload.
    """

    closed_s: float
    open_s: float
    window_s: float
    shares: tuple[float, ...]
    calm_s: float
    overload_s: float


FULL = Pace(closed_s=2.0, open_s=6.0, window_s=2.0, shares=FULL_SHARES, calm_s=5.0, overload_s=OVERLOAD_S)
QUICK = Pace(closed_s=0.8, open_s=2.0, window_s=0.8, shares=QUICK_SHARES, calm_s=1.0, overload_s=QUICK_OVERLOAD_S)


def run_serving(
    plan: Plan, runners: Sequence[Runner], analyzer: Path | None, results: Results, progress: Progress
) -> None:
    """Serve every artifact in turn, or with `quick` the one that "auto" means; what cannot be served is noted.

    Args:
        plan: what is measured.
        runners: the same artifacts in process.
        analyzer: perf_analyzer's binary; None where there is none, which is noted already.
        results: where results go as soon as they are there.
        progress: for the bar.
    """
    if results.has("serving"):
        return
    chosen = _served(plan, runners, results)
    pace = QUICK if plan.quick else FULL
    triton = 2 + plan.rounds * (1 + len(LOOPS)) + len(pace.shares) + len(LOOPS) * (analyzer is not None)
    gateway = 1 + plan.rounds * (1 + len(GATEWAY_LOOPS))
    with steps(progress, "serving", len(chosen) * (triton + gateway)) as done:
        for runner in chosen:
            point = runner.point.name
            servers: tuple[tuple[str, Callable[[], None]], ...] = (
                (point, partial(_serve, plan, runner, pace, analyzer, results, done)),
                (f"{point}, {GATEWAY}", partial(_serve_gateway, plan, runner, pace, results, done)),
            )
            for name, measure in servers:
                if results.has(f"serving {name}"):
                    continue
                try:
                    measure()
                except MirrorError as error:
                    results.fail("serving", name, error)
                results.finish(f"serving {name}")
    results.finish("serving")


def _served(plan: Plan, runners: Sequence[Runner], results: Results) -> Sequence[Runner]:
    if not plan.quick or len(runners) < 2:
        return runners
    try:
        engine, precision, _ = choose(plan.manifest, AUTO, AUTO)
    except EngineError:
        engine, precision = EngineName.FAKE, Precision.FP32
    chosen = [runner for runner in runners if (runner.point.engine, runner.point.precision) == (engine, precision)]
    chosen = chosen or [runners[0]]
    for runner in runners:
        if runner is not chosen[0]:
            results.fail("serving", runner.point.name, f"a quick run serves one artifact, {chosen[0].point.name}")
    return chosen


def _serve(
    plan: Plan, runner: Runner, pace: Pace, analyzer: Path | None, results: Results, done: Callable[[str], None]
) -> None:
    point, texts = runner.point, plan.workload.texts[:MOST_TEXTS]
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        repository, scratch = Path(folder) / "models", Path(folder) / "scratch"
        repository.mkdir()
        scratch.mkdir()
        options = ServingOptions(engine=point.engine.value, precision=point.precision.value)
        write_temporary_repository(plan.bundle, repository, options)
        done(f"{point.name}: start")
        with Server(repository) as server:
            served = Served(server)
            result = ServingResult(
                engine=point.engine, precision=point.precision, server=served.version(), protocol=GRPC,
                in_process_texts_per_s=0.0, closed=(), open=(), perf_analyzer=(), overload=None,
            )  # fmt: skip
            turns = Turns(runner, texts, LOOPS)
            for _ in range(plan.rounds):
                turns.round(lambda callers, size: served.closed(texts, callers, size, pace.closed_s), done)
                result = turns.added_to(result)
                results.serving[result.name] = result
            reference = next(
                loop for loop in result.closed if (loop.concurrency, loop.texts_a_request) == REFERENCE_LOOP
            )
            for share in pace.shares:
                rate = share * reference.texts_per_s
                done(f"{point.name}: {rate:.0f} a second")
                arrived = served.open(texts, rate, pace.open_s, plan.seed)
                result = replace(result, open=(*result.open, arrived))
                results.serving[result.name] = result
                if not arrived.kept_up:
                    break
            for callers, size in LOOPS if analyzer is not None else ():
                assert analyzer is not None  # or there would be no loop
                done(f"{point.name}: perf_analyzer, {callers} x {size}")
                try:
                    run = run_perf_analyzer(
                        analyzer, model=MODEL_NAME, grpc_port=server.grpc_port, texts=texts,
                        concurrency=callers, texts_a_request=size, seconds=pace.window_s, scratch=scratch,
                    )  # fmt: skip
                except PeerError as error:
                    results.fail("serving", PERF_ANALYZER, f"{point.name}: {error}")
                    break
                result = replace(result, perf_analyzer=(*result.perf_analyzer, run))
                results.serving[result.name] = result
            done(f"{point.name}: overload")
            try:
                overload = run_overload(
                    f"{server.host}:{server.grpc_port}", texts, leader=server.pid, calm_s=pace.calm_s,
                    seconds=pace.overload_s, seed=plan.seed, max_tokens_in_flight=options.max_tokens_in_flight,
                )  # fmt: skip
            except ServerError as error:
                results.fail("serving", point.name, f"overload: {error}")
            else:
                results.serving[result.name] = replace(result, overload=overload)


def _serve_gateway(plan: Plan, runner: Runner, pace: Pace, results: Results, done: Callable[[str], None]) -> None:
    """Measure the closed loops of `mirror gateway`, which runs the artifact in its own process."""
    point, texts = runner.point, plan.workload.texts[:MOST_TEXTS]
    done(f"{point.name}: start the gateway")
    with running_gateway(plan.bundle, point) as gateway:
        result = ServingResult(
            engine=point.engine, precision=point.precision, server=gateway.version(), protocol=GATEWAY,
            in_process_texts_per_s=0.0, closed=(), open=(), perf_analyzer=(), overload=None,
        )  # fmt: skip

        def ask(callers: int, size: int) -> tuple[Load, None]:
            requests = requests_of(texts, size)
            return closed_loop(gateway.connect, requests, concurrency=callers, seconds=pace.closed_s), None

        turns = Turns(runner, texts, GATEWAY_LOOPS)
        for _ in range(plan.rounds):
            turns.round(ask, done)
            result = turns.added_to(result)
            results.serving[result.name] = result
