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

from benchmarks.load.generator import Load, Window, load_process
from benchmarks.load.perf_analyzer import NAME as PERF_ANALYZER
from benchmarks.load.perf_analyzer import find_perf_analyzer, run_perf_analyzer
from benchmarks.load.requests import GATEWAY, GRPC
from benchmarks.load.servers import Row, Statistics, running_gateway, triton_statistics
from benchmarks.load.targets import Outcome
from benchmarks.plan import Plan, Runner, Suite, loaded, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better, Condition
from benchmarks.report.statistics import median, percentile
from mirror_runtime.errors import ServerError
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
    """How many seconds each part takes; `shares` are the open loop's rates, `calm_s` is a loop before the overload."""

    closed_s: float
    open_s: float
    shares: tuple[float, ...]
    calm_s: float
    overload_s: float


FULL = Pace(closed_s=2.0, open_s=6.0, shares=(0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2), calm_s=5.0, overload_s=60.0)
QUICK = Pace(closed_s=0.8, open_s=2.0, shares=(0.5, 0.9, 1.2), calm_s=1.0, overload_s=5.0)
"""A small encoder on two cores accepts requests for about three seconds of overload before it refuses any."""


@dataclass(frozen=True, kw_only=True)
class Party:
    """One variant: how it is measured, where its measurements go, and its line of progress."""

    runner: Runner
    texts: Sequence[str]
    pace: Pace
    seed: int
    recorder: Recorder
    on_step: Callable[[str], None]
    samples: dict[tuple[object, ...], list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def name(self) -> str:
        """Engine and precision."""
        return self.runner.variant.name

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


def run_serving(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Serve every variant in turn, or with `quick` the first; record what cannot be served."""
    pace, analyzer = QUICK if plan.quick else FULL, None
    with recorder.failing(SUITE, PERF_ANALYZER, OSError):
        say = partial(progress.console.print, style="dim", markup=False)
        analyzer = find_perf_analyzer(plan.environments.given, plan.environments.folder, say)
    with loaded(plan, recorder, Suite.SERVING) as runners:
        for runner in runners[1:] if plan.quick else ():
            recorder.fail(SUITE, runner.variant.name, "a quick run measures one artifact")
        served = runners[:1] if plan.quick else runners
        rounds = sum(1 + plan.rounds * (1 + len(loops)) for loops in LOOPS.values())
        once = 1 + len(pace.shares) + len(LOOPS[GRPC]) * (analyzer is not None)
        with steps(progress, "serving", len(served) * (rounds + once)) as on_step:
            for runner in served:
                texts = plan.workload.texts[:MOST_TEXTS]
                party = Party(runner=runner, texts=texts, pace=pace, seed=plan.seed, recorder=recorder, on_step=on_step)
                with recorder.failing(SUITE, f"{party.name}, triton"):
                    _measure_triton(plan, analyzer, party)
                with recorder.failing(SUITE, f"{party.name}, gateway"):
                    _measure_gateway(plan, party)


def _measure_triton(plan: Plan, analyzer: Path | None, party: Party) -> None:
    variant, pace = party.runner.variant, party.pace
    options = ServingOptions(engine=variant.engine.value, precision=variant.precision.value)
    party.step("start Triton")
    folder = plan.scratch / "triton"
    repository = folder / "models"
    repository.mkdir(parents=True, exist_ok=True)
    write_temporary_repository(plan.bundle, repository, options)
    with (
        Server(repository) as server,
        load_process({GRPC: f"{server.host}:{server.grpc_port}"}, party.texts, timeout_s=TIMEOUT_S) as load,
    ):
        statistics = triton_statistics(server)
        for _ in range(plan.rounds):
            measure_round(party, load, GRPC, statistics)
        rate = median(party.samples[("texts per second", *closed_conditions("triton", *REFERENCE_LOOP).items())])
        for share in pace.shares:
            party.step(f"{share * rate:.0f} requests per second")
            if not measure_rate(party, load, share, rate, statistics):
                break
        if analyzer is not None:
            with party.recorder.failing(SUITE, f"{party.name}, {PERF_ANALYZER}"):
                for callers, size in LOOPS[GRPC]:
                    party.step(f"perf_analyzer, {callers} x {size}")
                    rows = run_perf_analyzer(
                        analyzer, server.grpc_port, party.texts, callers=callers, size=size, window_s=pace.closed_s,
                        scratch=folder,
                    )  # fmt: skip
                    party.add({**closed_conditions("triton", callers, size), "client": PERF_ANALYZER}, *rows)
        party.step("overload")
        bound = options.max_tokens_in_flight
        measure_overload(party, load, lambda: resident_bytes(group_members(server.pid)), bound)


def _measure_gateway(plan: Plan, party: Party) -> None:
    """Measure the closed loops of `mirror gateway`, which runs the variant in its own process."""
    party.step("start the gateway")
    with (
        running_gateway(plan.bundle, party.runner.variant) as address,
        load_process({GATEWAY: address}, party.texts, timeout_s=TIMEOUT_S) as load,
    ):
        for _ in range(plan.rounds):
            measure_round(party, load, GATEWAY)


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


def measure_round(party: Party, load: Load, target: str, statistics: Statistics = list) -> None:
    """Measure a pass in process and then each closed loop."""
    server, encoder, texts = "gateway" if target == GATEWAY else "triton", party.runner.encoder, party.texts
    party.step("in process")
    encoder.encode(texts[:64])  # brings code and weights back into the caches
    began = time.perf_counter()
    encoder.encode(texts)
    rate = len(texts) / (time.perf_counter() - began)
    in_process = {"server": "in process", "beside": server}
    party.add(in_process, ("texts per second", "1/s", [rate]), better=Better.HIGHER)
    for callers, size in LOOPS[target]:
        party.step(f"{callers} x {size}")
        window = answered(load.closed(callers=callers, seconds=party.pace.closed_s, turn=(target, size)))
        conditions = closed_conditions(server, callers, size)
        party.add(conditions, ("texts per second", "1/s", [window.rate * size]), better=Better.HIGHER)
        failed = [window.unexpected]
        party.add(
            conditions, ("time per request", "ms", window.times_ms), ("failed requests", "", failed), *statistics()
        )


def measure_rate(party: Party, load: Load, share: float, reference_rate: float, statistics: Statistics) -> bool:
    """Measure random arrivals of single texts at a share of a rate, and return whether the server kept up."""
    seconds = party.pace.open_s
    load.begin(rate=share * reference_rate, seconds=seconds, turn=(GRPC, 1), seed=party.seed)
    window = answered(load.take("wait"))
    offered, unsent = window.requests / seconds, window.count(Outcome.UNSENT)
    kept_up = window.rate >= KEPT_UP * offered and not unsent
    party.add(
        {"server": "triton", "loop": "open", "share": share},
        ("offered per second", "1/s", [offered]),
        ("answered per second", "1/s", [window.rate]),
        ("time per request", "ms", window.times_ms),
        ("failed requests", "", [window.unexpected - unsent]),
        ("unsent requests", "", [unsent]),
        ("sending lag", "ms", window.lag_ms),
        ("kept up", "", [kept_up]),
        *statistics(),
    )
    return kept_up


def measure_overload(party: Party, load: Load, memory_bytes: Callable[[], int], max_tokens_in_flight: int) -> None:
    """Offer the server twice its maximum, and record what it answers, refuses, and how soon it has recovered."""
    size, pace, before = OVERLOAD_TEXTS_PER_REQUEST, party.pace, memory_bytes()
    turn = (GRPC, size)
    calm = answered(load.closed(callers=1, seconds=pace.calm_s, turn=turn))
    maximum = answered(load.closed(callers=OVERLOAD_CALLERS, seconds=pace.calm_s, turn=turn)).rate
    calm_ms = percentile(calm.times_ms, 99)
    load.begin(rate=OVERLOAD_FACTOR * maximum, seconds=pace.overload_s, turn=turn, seed=party.seed, calm_ms=calm_ms)
    window, after = answered(load.take("wait")), memory_bytes()
    refused, recovery_s = window.count(Outcome.OVERLOADED), window.recovery_s
    party.add(
        {"server": "triton", "loop": "overload", "texts per request": size, "tokens": max_tokens_in_flight},
        ("maximum texts per second", "1/s", [maximum * size]),
        ("offered texts per second", "1/s", [window.requests * size / pace.overload_s]),
        ("texts per second", "1/s", [window.rate * size]),
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
