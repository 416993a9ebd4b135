"""Closed loops of a server, in turns with passes of the same artifact in process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.load import Load
from benchmarks.serving_results import ClosedLoop, ServerTimes, ServingResult
from benchmarks.session import Runner
from benchmarks.summary import median, percentile, thin

Ask = Callable[[int, int], tuple[Load, ServerTimes | None]]
"""Runs one closed loop of so many callers and texts a request."""


class Turns:
    """Rounds of a pass in process and one of each closed loop.

    Args:
        runner: the artifact in process.
        texts: of a pass.
        loops: callers and texts a request of each loop.
    """

    def __init__(self, runner: Runner, texts: Sequence[str], loops: Sequence[tuple[int, int]]) -> None:
        self._runner = runner
        self._texts = texts
        self._in_process: list[float] = []
        self._loops = [_Loop(concurrency=callers, texts_a_request=size) for callers, size in loops]

    def round(self, ask: Ask, done: Callable[[str], None]) -> None:
        """Run one round; `done` is told what comes next."""
        name = self._runner.point.name
        done(f"{name}: in process")
        self._in_process.append(len(self._texts) / self._pass())
        for loop in self._loops:
            done(f"{name}: {loop.concurrency} x {loop.texts_a_request}")
            loop.take(*ask(loop.concurrency, loop.texts_a_request))

    def added_to(self, result: ServingResult) -> ServingResult:
        """Give a result with the rounds so far in it."""
        return replace(
            result,
            in_process_texts_per_s=median(self._in_process),
            closed=tuple(loop.result() for loop in self._loops),
        )

    def _pass(self) -> float:
        """Give the seconds of one pass over the texts, after a short one to wake the caches."""
        self._runner.encoder.encode(self._texts[:64])
        began = time.perf_counter()
        self._runner.encoder.encode(self._texts)
        return time.perf_counter() - began


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


def _middle(times: Sequence[ServerTimes]) -> ServerTimes | None:
    if not times:
        return None
    return ServerTimes(
        queue_ms=median([one.queue_ms for one in times]),
        compute_ms=median([one.compute_ms for one in times]),
        texts_per_execution=median([one.texts_per_execution for one in times]),
    )
