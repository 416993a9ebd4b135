"""Suite `serving`: artifacts behind the real Triton on loopback, in closed loops and under random arrivals."""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.load import Caller, Connect, Load, closed_loop, open_loop
from benchmarks.perf_analyzer import NAME as PERF_ANALYZER
from benchmarks.perf_analyzer import run_perf_analyzer
from benchmarks.serving_results import ClosedLoop, OpenLoop, ServerTimes, ServingResult
from benchmarks.session import Plan, Results, Runner, steps
from benchmarks.summary import median, percentile, thin
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError, MirrorError, PeerError, ServerError
from mirror_runtime.selection import AUTO, choose
from mirror_runtime.triton.options import ServingOptions
from mirror_runtime.triton.repository import MODEL_NAME, write_temporary_repository
from mirror_runtime.triton.server import Server

LOOPS = ((1, 1), (8, 1), (32, 1), (4, 32))
"""Callers and texts a request."""

REFERENCE_LOOP = (32, 1)
"""Its rate is what the open loop's rates are shares of."""

FULL_SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
QUICK_SHARES = (0.5, 0.9, 1.2)
KEPT_UP = 0.95

OPEN_CALLERS = 64
"""More than are ever under way before the knee; behind it the requests that wait for a caller are late, and count."""

MOST_TEXTS = 2000
"""Of the workload, for a pass in process and for the callers to go round."""

SETTLE_S = 0.1
"""Triton counts a request a moment after it has answered it."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long each part takes, in seconds."""

    closed_s: float
    open_s: float
    window_s: float
    shares: tuple[float, ...]


FULL = Pace(closed_s=2.0, open_s=6.0, window_s=2.0, shares=FULL_SHARES)
QUICK = Pace(closed_s=0.8, open_s=2.0, window_s=0.8, shares=QUICK_SHARES)


@dataclass(kw_only=True)
class _Loop:
    """The rounds of one closed loop."""

    concurrency: int
    texts_a_request: int
    rates: list[float] = field(default_factory=list)
    samples_ms: list[float] = field(default_factory=list)
    errors: int = 0
    server: list[ServerTimes] = field(default_factory=list)

    def take(self, load: Load, times: ServerTimes | None) -> None:
        self.rates.append(len(load.samples_ms) * self.texts_a_request / load.wall_s)
        self.samples_ms += load.samples_ms
        self.errors += load.errors
        if times is not None:
            self.server.append(times)

    def result(self) -> ClosedLoop:
        return ClosedLoop(
            concurrency=self.concurrency,
            texts_a_request=self.texts_a_request,
            rounds_texts_per_s=tuple(self.rates),
            texts_per_s=median(self.rates),
            requests=len(self.samples_ms),
            samples_ms=thin(self.samples_ms),
            p50_ms=percentile(self.samples_ms, 50),
            p90_ms=percentile(self.samples_ms, 90),
            p99_ms=percentile(self.samples_ms, 99),
            p999_ms=percentile(self.samples_ms, 99.9),
            errors=self.errors,
            server=_middle(self.server),
        )


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
    turns = len(chosen) * (1 + plan.rounds * (1 + len(LOOPS)) + len(pace.shares) + len(LOOPS) * (analyzer is not None))
    with steps(progress, "serving", turns) as done:
        for runner in chosen:
            name = runner.point.name
            if results.has(f"serving {name}"):
                continue
            try:
                _serve(plan, runner, pace, analyzer, results, done)
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
            served = _Served(server)
            in_process: list[float] = []
            loops = [_Loop(concurrency=callers, texts_a_request=size) for callers, size in LOOPS]
            result = ServingResult(
                engine=point.engine, precision=point.precision, server=served.version(), protocol="grpc",
                in_process_texts_per_s=0.0, closed=(), open=(), perf_analyzer=(),
            )  # fmt: skip
            for _ in range(plan.rounds):
                done(f"{point.name}: in process")
                in_process.append(len(texts) / _pass(runner, texts))
                for loop in loops:
                    done(f"{point.name}: {loop.concurrency} x {loop.texts_a_request}")
                    loop.take(*served.closed(texts, loop.concurrency, loop.texts_a_request, pace.closed_s))
                result = replace(
                    result,
                    in_process_texts_per_s=median(in_process),
                    closed=tuple(loop.result() for loop in loops),
                )
                results.serving[point.name] = result
            reference = next(
                loop for loop in result.closed if (loop.concurrency, loop.texts_a_request) == REFERENCE_LOOP
            )
            for share in pace.shares:
                rate = share * reference.texts_per_s
                done(f"{point.name}: {rate:.0f} a second")
                arrived = served.open(texts, rate, pace.open_s, plan.seed)
                result = replace(result, open=(*result.open, arrived))
                results.serving[point.name] = result
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
                results.serving[point.name] = result


class _Served:
    """A running server as the loops need it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._url = f"http://127.0.0.1:{server.http_port}/v2"

    def version(self) -> str:
        """Name the server and its version."""
        said = self._ask("")
        return f"{said['name']} {said['version']}"

    def closed(
        self, texts: Sequence[str], concurrency: int, size: int, seconds: float
    ) -> tuple[Load, ServerTimes | None]:
        """Run one closed loop."""
        requests = [texts[at : at + size] for at in range(0, max(1, len(texts) - size + 1), size)]
        before = self._counters()
        load = closed_loop(self._connect(), requests, concurrency=concurrency, seconds=seconds)
        return load, self._times(before)

    def open(self, texts: Sequence[str], rate: float, seconds: float, seed: int) -> OpenLoop:
        """Run one open loop."""
        before = self._counters()
        load, count = open_loop(self._connect(), texts, rate=rate, seconds=seconds, callers=OPEN_CALLERS, seed=seed)
        offered = count / seconds
        achieved = len(load.samples_ms) / max(load.wall_s, seconds)
        return OpenLoop(
            offered_per_s=offered,
            achieved_per_s=achieved,
            requests=len(load.samples_ms),
            samples_ms=thin(load.samples_ms),
            p50_ms=percentile(load.samples_ms, 50),
            p90_ms=percentile(load.samples_ms, 90),
            p99_ms=percentile(load.samples_ms, 99),
            p999_ms=percentile(load.samples_ms, 99.9),
            errors=load.errors,
            unsent=load.unsent,
            kept_up=achieved >= KEPT_UP * offered and not load.unsent,
            server=self._times(before),
        )

    def _connect(self) -> Connect:
        def connect() -> AbstractContextManager[Caller]:
            return self._server.client("grpc")

        return connect

    def _counters(self) -> Mapping[str, int]:
        time.sleep(SETTLE_S)
        stats = self._ask(f"/models/{MODEL_NAME}/stats")["model_stats"][0]
        times = stats["inference_stats"]
        compute = sum(times[part]["ns"] for part in ("compute_input", "compute_infer", "compute_output"))
        return {
            "texts": stats["inference_count"],
            "executions": stats["execution_count"],
            "requests": times["success"]["count"],
            "queue_ns": times["queue"]["ns"],
            "compute_ns": compute,
        }

    def _times(self, before: Mapping[str, int]) -> ServerTimes | None:
        gained = {name: value - before[name] for name, value in self._counters().items()}
        if not gained["requests"] or not gained["executions"]:
            return None
        return ServerTimes(
            queue_ms=gained["queue_ns"] / gained["requests"] / 1e6,
            compute_ms=gained["compute_ns"] / gained["requests"] / 1e6,
            texts_per_execution=gained["texts"] / gained["executions"],
        )

    def _ask(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self._url + path, timeout=10) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:
            raise ServerError(f"the server's {self._url + path} cannot be read: {error}") from error


def _pass(runner: Runner, texts: Sequence[str]) -> float:
    """Give the seconds of one pass over the texts in process, after a short one to wake the caches."""
    runner.encoder.encode(texts[:64])
    began = time.perf_counter()
    runner.encoder.encode(texts)
    return time.perf_counter() - began


def _middle(times: Sequence[ServerTimes]) -> ServerTimes | None:
    if not times:
        return None
    return ServerTimes(
        queue_ms=median([one.queue_ms for one in times]),
        compute_ms=median([one.compute_ms for one in times]),
        texts_per_execution=median([one.texts_per_execution for one in times]),
    )
