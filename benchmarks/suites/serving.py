"""Suite `serving`: variants behind the real Triton and the gateway on loopback, at and beyond their maximum load.

Every measurement has the condition `server`: "in process", "triton" or "gateway"; those of a load also have `loop`:

- closed: callers send their next request when the last one is answered; rounds take turns with passes in process.
- open: single texts arrive at random (Poisson), at rising shares of a closed loop's rate, until one is too much.
- overload: twice the rate of a closed loop of the same requests.

Only the closed loops' rates have a direction of improvement: the times follow from them and from the callers.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.progress import Progress

from benchmarks.load.generator import Window
from benchmarks.load.perf_analyzer import NAME as PERF_ANALYZER
from benchmarks.load.perf_analyzer import find_perf_analyzer, run_perf_analyzer
from benchmarks.load.process import Load, load_process
from benchmarks.load.requests import GATEWAY, GRPC
from benchmarks.load.servers import Row, running_gateway, triton_statistics
from benchmarks.load.targets import Outcome
from benchmarks.plan import Plan, Runner, Suite, auto_variants, loaded, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better, Condition
from benchmarks.report.statistics import median, percentile
from mirror_runtime.errors import PeerError, ServerError
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from mirror_runtime.triton.server.processes import group_members, resident_bytes
from mirror_runtime.triton.server.server import Server

SUITE = Suite.SERVING.value

LOOPS = {GRPC: ((1, 1), (8, 1), (32, 1), (4, 32)), GATEWAY: ((8, 1), (32, 1), (4, 32))}
"""Callers and texts per request of each target's closed loops."""

REFERENCE_LOOP = (32, 1)
"""The open loop's rates are shares of this closed loop's rate."""

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
        closed_s: a round of a closed loop, and a window of perf_analyzer's.
        open_s: a rate of the open loop.
        shares: rates of the open loop.
        calm_s: each of the two loops before the overload.
        overload_s: the overload.
    """

    closed_s: float
    open_s: float
    shares: tuple[float, ...]
    calm_s: float
    overload_s: float


FULL = Pace(closed_s=2.0, open_s=6.0, shares=(0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2), calm_s=5.0, overload_s=60.0)
QUICK = Pace(closed_s=0.8, open_s=2.0, shares=(0.5, 0.9, 1.2), calm_s=1.0, overload_s=5.0)
"""A small encoder on two cores accepts requests for about three seconds of overload before it refuses any."""


def run_serving(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Serve every variant in turn, or with `quick` the one that "auto" means; record what cannot be served."""
    pace, analyzer = QUICK if plan.quick else FULL, None
    with recorder.failing(SUITE, PERF_ANALYZER, OSError):
        analyzer = find_perf_analyzer(
            plan.environments.given.get(PERF_ANALYZER),
            plan.environments.folder,
            partial(progress.console.print, style="dim", markup=False),
        )
    with loaded(plan, recorder, Suite.SERVING) as runners:
        variants = auto_variants(plan, Suite.SERVING, [runner.variant for runner in runners], recorder)
        chosen = [runner for runner in runners if runner.variant in variants]
        rounds = sum(1 + plan.rounds * (1 + len(loops)) for loops in LOOPS.values())
        once = 1 + len(pace.shares) + len(LOOPS[GRPC]) * (analyzer is not None)
        with steps(progress, "serving", len(chosen) * (rounds + once)) as on_step:
            for runner in chosen:
                party = Party(name=runner.variant.name, recorder=recorder, on_step=on_step)
                with recorder.failing(SUITE, f"{party.name}, triton"):
                    _measure_triton(plan, runner, pace, analyzer, party)
                with recorder.failing(SUITE, f"{party.name}, gateway"):
                    _measure_gateway(plan, runner, pace, party)


@dataclass(frozen=True, kw_only=True)
class Party:
    """One variant: where its measurements go, and its line of progress."""

    name: str
    recorder: Recorder
    on_step: Callable[[str], None]
    samples: dict[tuple[object, ...], list[float]] = field(default_factory=lambda: defaultdict(list))

    def step(self, word: str) -> None:
        """Show what comes next."""
        self.on_step(f"{self.name}: {word}")

    def add(self, conditions: Mapping[str, Condition], *rows: Row, better: Better = Better.NEITHER) -> None:
        """Record measurements that have samples; those of a further round are added to the earlier ones."""
        for metric, unit, samples in rows:
            known = self.samples[(metric, *conditions.items())]
            known.extend(samples)
            if known:
                self.recorder.record(SUITE, self.name, metric, *known, unit=unit, better=better, conditions=conditions)


def answered(window: Window) -> Window:
    """Return a window in which a request was answered.

    Raises:
        ServerError: no request was answered; the message has the first reason.
    """
    if not window.times_ms:
        raise ServerError(f"no request was answered: {window.reason}")
    return window


def closed_conditions(server: str, callers: int, size: int) -> dict[str, Condition]:
    """Return the conditions of a closed loop."""
    return {"server": server, "loop": "closed", "callers": callers, "texts per request": size}


def measure_round(
    runner: Runner,
    texts: Sequence[str],
    load: Load,
    target: str,
    seconds: float,
    party: Party,
    server_rows: Callable[[], Sequence[Row]] = list,
) -> None:
    """Measure a pass in process and then each closed loop."""
    server = "gateway" if target == GATEWAY else "triton"
    party.step("in process")
    runner.encoder.encode(texts[:64])  # brings code and weights back into the caches
    began = time.perf_counter()
    runner.encoder.encode(texts)
    pass_row = ("texts per second", "1/s", [len(texts) / (time.perf_counter() - began)])
    party.add({"server": "in process", "beside": server}, pass_row, better=Better.HIGHER)
    for callers, size in LOOPS[target]:
        party.step(f"{callers} x {size}")
        window = answered(load.closed(callers=callers, seconds=seconds, turn=(target, size)))
        conditions = closed_conditions(server, callers, size)
        rate = len(window.times_ms) * size / window.seconds
        party.add(conditions, ("texts per second", "1/s", [rate]), better=Better.HIGHER)
        party.add(
            conditions,
            ("time per request", "ms", window.times_ms),
            ("failed requests", "", [window.unexpected]),
            *server_rows(),
        )


def _measure_triton(plan: Plan, runner: Runner, pace: Pace, analyzer: Path | None, party: Party) -> None:
    variant, texts = runner.variant, plan.workload.texts[:MOST_TEXTS]
    options = ServingOptions(engine=variant.engine.value, precision=variant.precision.value)
    party.step("start Triton")
    folder = plan.scratch / "triton"
    repository = folder / "models"
    repository.mkdir(parents=True, exist_ok=True)
    write_temporary_repository(plan.bundle, repository, options)
    with (
        Server(repository) as server,
        load_process({GRPC: f"{server.host}:{server.grpc_port}"}, texts, timeout_s=TIMEOUT_S) as load,
    ):
        server_rows = triton_statistics(server)
        for _ in range(plan.rounds):
            measure_round(runner, texts, load, GRPC, pace.closed_s, party, server_rows)
        rate = median(party.samples[("texts per second", *closed_conditions("triton", *REFERENCE_LOOP).items())])
        for share in pace.shares:
            party.step(f"{share * rate:.0f} requests per second")
            if not measure_rate(load, share, rate, pace.open_s, plan.seed, party, server_rows):
                break
        if analyzer is not None:
            _run_perf_analyzer(analyzer, server.grpc_port, texts, pace.closed_s, folder, party)
        party.step("overload")
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
    server_rows: Callable[[], Sequence[Row]],
) -> bool:
    """Measure random arrivals of single texts at a share of a rate, and return whether the server kept up."""
    load.begin(rate=share * reference_rate, seconds=seconds, turn=(GRPC, 1), seed=seed)
    window = answered(load.take("wait"))
    rate, offered = len(window.times_ms) / window.seconds, window.requests / seconds
    unsent = window.count(Outcome.UNSENT)
    kept_up = rate >= KEPT_UP * offered and not unsent
    party.add(
        {"server": "triton", "loop": "open", "share": share},
        ("offered per second", "1/s", [offered]),
        ("answered per second", "1/s", [rate]),
        ("time per request", "ms", window.times_ms),
        ("failed requests", "", [window.unexpected - unsent]),
        ("unsent requests", "", [unsent]),
        ("sending lag", "ms", window.lag_ms),
        ("kept up", "", [kept_up]),
        *server_rows(),
    )
    return kept_up


def _run_perf_analyzer(
    program: Path, grpc_port: int, texts: Sequence[str], window_s: float, scratch: Path, party: Party
) -> None:
    """Measure the closed loops of the same server and texts with NVIDIA's perf_analyzer."""
    for callers, size in LOOPS[GRPC]:
        party.step(f"perf_analyzer, {callers} x {size}")
        try:
            rate, p50_ms, p99_ms = run_perf_analyzer(
                program, grpc_port=grpc_port, texts=texts, callers=callers, size=size, seconds=window_s, scratch=scratch
            )
        except PeerError as error:
            party.recorder.fail(SUITE, PERF_ANALYZER, f"{party.name}: {error}")
            return
        party.add(
            {**closed_conditions("triton", callers, size), "client": PERF_ANALYZER},
            ("texts per second", "1/s", [rate]),
            ("p50 of requests", "ms", [p50_ms]),
            ("p99 of requests", "ms", [p99_ms]),
        )


def measure_overload(
    load: Load, pace: Pace, seed: int, party: Party, memory_bytes: Callable[[], int], max_tokens_in_flight: int
) -> None:
    """Offer the server twice its maximum, and record what it answers, refuses, and how soon it has recovered."""
    size = OVERLOAD_TEXTS_PER_REQUEST
    turn, before = (GRPC, size), memory_bytes()
    calm = answered(load.closed(callers=1, seconds=pace.calm_s, turn=turn))
    most = answered(load.closed(callers=OVERLOAD_CALLERS, seconds=pace.calm_s, turn=turn))
    maximum, calm_p99_ms = len(most.times_ms) / most.seconds, percentile(calm.times_ms, 99)
    load.begin(
        rate=OVERLOAD_FACTOR * maximum, seconds=pace.overload_s, turn=turn, seed=seed, recover_within_ms=calm_p99_ms
    )
    window, after = load.take("wait"), memory_bytes()
    refused, recovery_s = answered(window).count(Outcome.OVERLOADED), window.recovery_s
    party.add(
        {"server": "triton", "loop": "overload", "texts per request": size, "tokens": max_tokens_in_flight},
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
    )
    if recovery_s is None:
        party.recorder.fail(SUITE, party.name, "overload: the server did not recover in time")


def _measure_gateway(plan: Plan, runner: Runner, pace: Pace, party: Party) -> None:
    """Measure the closed loops of `mirror gateway`, which runs the variant in its own process."""
    texts = plan.workload.texts[:MOST_TEXTS]
    party.step("start the gateway")
    with (
        running_gateway(plan.bundle, runner.variant) as address,
        load_process({GATEWAY: address}, texts, timeout_s=TIMEOUT_S) as load,
    ):
        for _ in range(plan.rounds):
            measure_round(runner, texts, load, GATEWAY, pace.closed_s, party)
