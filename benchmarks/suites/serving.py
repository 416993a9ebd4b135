"""Suite `serving`: variants behind the real Triton and the gateway on loopback, at and beyond their maximum load.

Every measurement has the condition `server`: "in process", "triton" or "gateway"; those of a load also have `loop`:

- closed: callers send their next request when the last one is answered; rounds take turns with passes in process.
- open: single texts arrive at random (Poisson), at rising shares of a closed loop's rate, until one is too much.
- overload: twice the rate of a closed loop of the same requests.

Only the closed loops' rates have a direction of improvement: the times follow from them and from the callers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from benchmarks.load.perf_analyzer import NAME as PERF_ANALYZER
from benchmarks.load.perf_analyzer import find_perf_analyzer, run_perf_analyzer
from benchmarks.load.process import Load, load_process
from benchmarks.load.servers import ServerTimes, TritonStatistics, running_gateway
from benchmarks.load.targets import GATEWAY, GRPC
from benchmarks.load.window import Outcome, Window
from benchmarks.plan import Plan, Runner, Suite, auto_variants, loaded, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better, Condition
from benchmarks.report.statistics import percentile
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import PeerError, ServerError
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from mirror_runtime.triton.server.processes import group_members, resident_bytes
from mirror_runtime.triton.server.server import Server

SUITE = Suite.SERVING.value

LOOPS = ((1, 1), (8, 1), (32, 1), (4, 32))
"""Callers and texts per request of the closed loops."""

GATEWAY_LOOPS = ((8, 1), (32, 1), (4, 32))

REFERENCE_LOOP = (32, 1)
"""The open loop's rates are shares of this closed loop's rate."""

FULL_SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
QUICK_SHARES = (0.5, 0.9, 1.2)

KEPT_UP = 0.95
"""Share of the offered requests that must be answered in time."""

MOST_TEXTS = 2000
"""Of the workload, for a pass in process and for the callers to go round."""

OVERLOAD_FACTOR = 2.0
"""The offered rate over the rate that the server can answer."""

OVERLOAD_TEXTS_PER_REQUEST = 16
"""Single texts would cost the sender more than the server, on the same cores."""

OVERLOAD_CALLERS = 8
"""Of the closed loop that finds the maximum: enough that none of the server's cores is idle."""

TIMEOUT_S = 60.0
"""Limit of one request."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long each part takes, in seconds.

    Attributes:
        closed_s: a round of a closed loop.
        open_s: a rate of the open loop.
        window_s: a window of perf_analyzer's.
        shares: rates of the open loop, of the reference loop's.
        calm_s: each of the two loops before the overload.
        overload_s: the overload.
    """

    closed_s: float
    open_s: float
    window_s: float
    shares: tuple[float, ...]
    calm_s: float
    overload_s: float


FULL = Pace(closed_s=2.0, open_s=6.0, window_s=2.0, shares=FULL_SHARES, calm_s=5.0, overload_s=60.0)
QUICK = Pace(closed_s=0.8, open_s=2.0, window_s=0.8, shares=QUICK_SHARES, calm_s=1.0, overload_s=5.0)
"""A small encoder on two cores accepts requests for about three seconds of overload before it refuses any."""


def run_serving(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Serve every variant in turn, or with `quick` the one that "auto" means; record what cannot be served."""
    pace = QUICK if plan.quick else FULL
    analyzer = _perf_analyzer(plan, recorder, progress)
    with loaded(plan, recorder, Suite.SERVING) as runners:
        variants = auto_variants(plan, Suite.SERVING, [runner.variant for runner in runners], recorder)
        chosen = [runner for runner in runners if runner.variant in variants]
        triton = 2 + plan.rounds * (1 + len(LOOPS)) + len(pace.shares) + len(LOOPS) * (analyzer is not None)
        gateway = 1 + plan.rounds * (1 + len(GATEWAY_LOOPS))
        with steps(progress, "serving", len(chosen) * (triton + gateway)) as done:
            for runner in chosen:
                name = runner.variant.name

                def on_step(word: str, name: str = name) -> None:
                    done(f"{name}: {word}")

                party = Party(name=name, recorder=recorder, on_step=on_step)
                with recorder.failing(SUITE, f"{name}, triton"):
                    _measure_triton(plan, runner, pace, analyzer, party)
                with recorder.failing(SUITE, f"{name}, gateway"):
                    _measure_gateway(plan, runner, pace, party)


@dataclass(frozen=True, kw_only=True)
class Party:
    """One variant: where its measurements go, and its line of progress."""

    name: str
    recorder: Recorder
    on_step: Callable[[str], None]

    def add(
        self,
        metric: str,
        unit: str,
        samples: Sequence[float],
        conditions: Mapping[str, Condition],
        better: Better = Better.NEITHER,
    ) -> None:
        """Record a measurement, unless there are no samples."""
        if samples:
            self.recorder.record(SUITE, self.name, metric, *samples, unit=unit, better=better, conditions=conditions)


@dataclass(kw_only=True)
class ClosedLoops:
    """Rounds of a pass in process and one of each closed loop, in turns.

    Attributes:
        runner: the variant in process.
        texts: of a pass.
        server: "triton" or "gateway".
        target: of the requests.
        party: receives the measurements after every round.
    """

    runner: Runner
    texts: Sequence[str]
    server: str
    target: str
    party: Party
    _in_process: list[float] = field(default_factory=list)
    _windows: dict[tuple[int, int], list[Window]] = field(default_factory=dict)
    _times: dict[tuple[int, int], list[ServerTimes]] = field(default_factory=dict)

    def round(
        self,
        loops: Sequence[tuple[int, int]],
        load: Load,
        seconds: float,
        server_times: Callable[[], ServerTimes | None] = lambda: None,
    ) -> None:
        """Run one round and record what is known so far."""
        self.party.on_step("in process")
        self.runner.encoder.encode(self.texts[:64])  # brings code and weights back into the caches
        began = time.perf_counter()
        self.runner.encoder.encode(self.texts)
        self._in_process.append(len(self.texts) / (time.perf_counter() - began))
        conditions = {"server": "in process", "beside": self.server}
        self.party.add("texts per second", "1/s", self._in_process, conditions, Better.HIGHER)
        for callers, size in loops:
            self.party.on_step(f"{callers} x {size}")
            window = load.closed(callers=callers, seconds=seconds, turn=(self.target, size))
            check_answered(window)
            self._windows.setdefault((callers, size), []).append(window)
            if (times := server_times()) is not None:
                self._times.setdefault((callers, size), []).append(times)
            self._record(callers, size)

    def rate(self, loop: tuple[int, int]) -> float:
        """Return the median rate of a loop, in requests per second."""
        return percentile([len(window.times_ms) / window.seconds for window in self._windows[loop]], 50)

    def _record(self, callers: int, size: int) -> None:
        windows, times = self._windows[callers, size], self._times.get((callers, size), [])
        conditions = closed_conditions(self.server, callers, size)
        rates = [len(window.times_ms) * size / window.seconds for window in windows]
        self.party.add("texts per second", "1/s", rates, conditions, Better.HIGHER)
        self.party.add("time per request", "ms", [ms for w in windows for ms in w.times_ms], conditions)
        self.party.add("failed requests", "", [w.unexpected for w in windows], conditions)
        record_server_times(self.party, times, conditions)


def closed_conditions(server: str, callers: int, size: int) -> dict[str, Condition]:
    """Return the conditions of a closed loop."""
    return {"server": server, "loop": "closed", "callers": callers, "texts per request": size}


def record_server_times(party: Party, times: Sequence[ServerTimes], conditions: Mapping[str, Condition]) -> None:
    """Record Triton's own statistics, one sample per round."""
    party.add("queue time", "ms", [one.queue_ms for one in times], conditions)
    party.add("compute time", "ms", [one.compute_ms for one in times], conditions)
    party.add("texts per execution", "", [one.texts_per_execution for one in times], conditions)


def check_answered(window: Window) -> None:
    """Raise unless a request was answered.

    Raises:
        ServerError: no request was answered; the message has the first reason.
    """
    if not window.times_ms:
        raise ServerError(f"no request was answered: {window.reason}")


def _perf_analyzer(plan: Plan, recorder: Recorder, progress: Progress) -> Path | None:
    with recorder.failing(SUITE, PERF_ANALYZER, OSError):
        return find_perf_analyzer(
            plan.environments.given.get(PERF_ANALYZER),
            plan.environments.folder,
            lambda line: progress.console.print(line, style="dim", markup=False),
        )
    return None


def _measure_triton(plan: Plan, runner: Runner, pace: Pace, analyzer: Path | None, party: Party) -> None:
    variant, texts = runner.variant, plan.workload.texts[:MOST_TEXTS]
    options = ServingOptions(engine=variant.engine.value, precision=variant.precision.value)
    party.on_step("start Triton")
    with ExitStack() as stack:
        folder = plan.scratch / "triton"
        repository = folder / "models"
        repository.mkdir(parents=True, exist_ok=True)
        write_temporary_repository(plan.bundle, repository, options)
        server = stack.enter_context(Server(repository))
        address = f"{server.host}:{server.grpc_port}"
        load = stack.enter_context(load_process({GRPC: address}, texts, timeout_s=TIMEOUT_S))
        statistics = TritonStatistics(server)
        loops = ClosedLoops(runner=runner, texts=texts, server="triton", target=GRPC, party=party)
        for _ in range(plan.rounds):
            loops.round(LOOPS, load, pace.closed_s, statistics.take)
        rate = loops.rate(REFERENCE_LOOP)
        for share in pace.shares:
            party.on_step(f"{share * rate:.0f} requests per second")
            if not measure_rate(load, share, rate, pace.open_s, plan.seed, party, statistics.take):
                break
        if analyzer is not None:
            _run_perf_analyzer(analyzer, server.grpc_port, texts, pace.window_s, folder, party)
        measure_overload(
            load, pace, plan.seed, party, lambda: resident_bytes(group_members(server.pid)),
            options.max_tokens_in_flight,
        )  # fmt: skip


def measure_rate(
    load: Load,
    share: float,
    reference_rate: float,
    seconds: float,
    seed: int,
    party: Party,
    server_times: Callable[[], ServerTimes | None],
) -> bool:
    """Measure random arrivals of single texts at a share of a rate, and return whether the server kept up."""
    window, _ = load.open(rate=share * reference_rate, seconds=seconds, turn=(GRPC, 1), seed=seed)
    check_answered(window)
    answered, offered = len(window.times_ms) / window.seconds, window.requests / seconds
    unsent = window.count(Outcome.UNSENT)
    kept_up = answered >= KEPT_UP * offered and not unsent
    conditions: dict[str, Condition] = {"server": "triton", "loop": "open", "share": share}
    party.add("offered per second", "1/s", [offered], conditions)
    party.add("answered per second", "1/s", [answered], conditions)
    party.add("time per request", "ms", window.times_ms, conditions)
    party.add("failed requests", "", [window.unexpected - unsent], conditions)
    party.add("unsent requests", "", [unsent], conditions)
    party.add("sending lag", "ms", window.lag_ms, conditions)
    party.add("kept up", "", [float(kept_up)], conditions)
    times = server_times()
    record_server_times(party, [] if times is None else [times], conditions)
    return kept_up


def _run_perf_analyzer(
    program: Path, grpc_port: int, texts: Sequence[str], window_s: float, scratch: Path, party: Party
) -> None:
    """Measure the closed loops of the same server and texts with NVIDIA's perf_analyzer."""
    for callers, size in LOOPS:
        party.on_step(f"perf_analyzer, {callers} x {size}")
        try:
            rate, p50_ms, p99_ms = run_perf_analyzer(
                program, model=MODEL_NAME, grpc_port=grpc_port, texts=texts, callers=callers, size=size,
                seconds=window_s, scratch=scratch,
            )  # fmt: skip
        except PeerError as error:
            party.recorder.fail(SUITE, PERF_ANALYZER, f"{party.name}: {error}")
            return
        conditions = {**closed_conditions("triton", callers, size), "client": PERF_ANALYZER}
        party.add("texts per second", "1/s", [rate], conditions)
        party.add("p50 of requests", "ms", [p50_ms], conditions)
        party.add("p99 of requests", "ms", [p99_ms], conditions)


def measure_overload(
    load: Load, pace: Pace, seed: int, party: Party, memory_bytes: Callable[[], int], max_tokens_in_flight: int
) -> None:
    """Offer the server twice its maximum, and record what it answers, refuses, and how soon it has recovered.

    Args:
        load: sends the requests.
        pace: of the two loops before, and of the overload.
        seed: of the arrivals.
        party: receives the measurements.
        memory_bytes: resident memory of all of the server's processes.
        max_tokens_in_flight: the server's bound on the work that it accepts.
    """
    party.on_step("overload")
    size = OVERLOAD_TEXTS_PER_REQUEST
    before = memory_bytes()
    calm = load.closed(callers=1, seconds=pace.calm_s, turn=(GRPC, size))
    check_answered(calm)
    most = load.closed(callers=OVERLOAD_CALLERS, seconds=pace.calm_s, turn=(GRPC, size))
    check_answered(most)
    maximum = len(most.times_ms) / most.seconds
    window, recovery_s = load.open(
        rate=OVERLOAD_FACTOR * maximum, seconds=pace.overload_s, turn=(GRPC, size), seed=seed,
        recover_within_ms=percentile(calm.times_ms, 99),
    )  # fmt: skip
    after = memory_bytes()
    check_answered(window)
    conditions: dict[str, Condition] = {"server": "triton", "loop": "overload", "texts per request": size}
    conditions["tokens"] = max_tokens_in_flight
    refused = window.count(Outcome.OVERLOADED)
    for metric, unit, samples in (
        ("maximum texts per second", "1/s", [maximum * size]),
        ("offered texts per second", "1/s", [window.requests * size / pace.overload_s]),
        ("texts per second", "1/s", [len(window.times_ms) * size / window.seconds]),
        ("calm time per request", "ms", calm.times_ms),
        ("time per request", "ms", window.times_ms),
        ("time per refusal", "ms", window.refused_ms),
        ("refused requests", "", [refused]),
        ("failed requests", "", [window.unexpected - refused]),
        ("sending lag", "ms", window.lag_ms),
        ("memory before", "B", [before]),
        ("memory after", "B", [after]),
        ("recovery", "s", [] if recovery_s is None else [recovery_s]),
        ("duration", "s", [pace.overload_s]),
    ):
        party.add(metric, unit, samples, conditions)
    if recovery_s is None:
        party.recorder.fail(SUITE, party.name, "overload: the server did not recover in time")


def _measure_gateway(plan: Plan, runner: Runner, pace: Pace, party: Party) -> None:
    """Measure the closed loops of `mirror gateway`, which runs the variant in its own process."""
    texts = plan.workload.texts[:MOST_TEXTS]
    party.on_step("start the gateway")
    with (
        running_gateway(plan.bundle, runner.variant) as address,
        load_process({GATEWAY: address}, texts, timeout_s=TIMEOUT_S) as load,
    ):
        loops = ClosedLoops(runner=runner, texts=texts, server="gateway", target=GATEWAY, party=party)
        for _ in range(plan.rounds):
            loops.round(GATEWAY_LOOPS, load, pace.closed_s)
