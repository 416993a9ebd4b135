"""One soak from the expected vectors to the server's end, with what was seen so far at hand when it is interrupted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine_results import Host
from benchmarks.results import Source
from benchmarks.soak_figures import ALL, Findings, counted, drift, growth, judge, restarts, second_half
from benchmarks.soak_load import Arrivals, Callers, measure_rate
from benchmarks.soak_requests import Expected, Mix, expect
from benchmarks.soak_results import (
    SCHEMA_VERSION,
    Ending,
    MemorySample,
    Settings,
    SoakReport,
    Subject,
    Window,
)
from benchmarks.soak_server import ServedBundle
from benchmarks.soak_tally import Outcome, Tally
from benchmarks.workload import Workload
from mirror_runtime.encoder import Encoder

MEASURE_S = 10.0
"""For the rate that the load is a share of, or a tenth of the run where that is shorter."""

_TICK_S = 0.5

Show = Callable[[float, str], None]
"""Takes the seconds of load that are over, and a word on the last window."""


@dataclass(kw_only=True)
class Seen:
    """What a soak has seen so far.

    Attributes:
        load_s: for how long requests have arrived.
        cpu_s: of the generator, meanwhile.
    """

    tally: Tally = field(default_factory=Tally)
    windows: list[Window] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    capacity_per_s: float | None = None
    load_s: float = 0.0
    cpu_s: float = 0.0
    partial: bool = False
    server_said: tuple[str, ...] = ()
    ending: Ending | None = None


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, and its right answers."""

    subject: Subject
    expected: Expected


def prepare(bundle: Path, workload: Workload, settings: Settings) -> Served:
    """Compute the right vectors in process, as the server will: the encoder is gone when this returns.

    Raises:
        BundleError: `bundle` is none.
        EngineError: it has nothing that runs here as asked.
    """
    with Encoder.load(bundle, engine=settings.engine, precision=settings.precision) as encoder:
        expected = expect(encoder, bundle, workload.texts, settings.seed)
        subject = Subject(
            name=bundle.resolve().name,
            fingerprint=encoder.fingerprint,
            engine=encoder.engine.name.value,
            precision=encoder.engine.precision.value,
            floor=expected.floor,
            canaries=expected.canaries,
            long_texts=len(expected.texts) - expected.long_from,
        )
    return Served(subject=subject, expected=expected)


def soak(bundle: Path, served: Served, settings: Settings, seen: Seen, show: Show) -> None:
    """Serve a bundle, put load on it, and end it. What it sees is in `seen` at any moment; Ctrl-C makes it partial.

    Raises:
        ServerError: the server did not start.
    """
    options = ("--engine", settings.engine, "--precision", settings.precision)
    try:
        with ServedBundle(bundle, *options) as server:
            try:
                asyncio.run(_Soak(server, served, settings, seen, show).run())
            finally:
                seen.ending = server.end()
                seen.server_said = tuple(server.said)
    except KeyboardInterrupt:  # its server has ended by now; it was killed where that was while it started or ended
        seen.partial = True


def build_report(
    served: Served,
    workload: Workload,
    settings: Settings,
    seen: Seen,
    *,
    started: str,
    host: Host,
    versions: Mapping[str, str],
    source: Source,
) -> SoakReport:
    """Put what was seen into a report, and judge it."""
    grown, drifted, problems = growth(seen.memory), drift(seen.windows), seen.tally.problems()
    outcomes = counted([window.outcomes for window in seen.windows])
    half = second_half(seen.memory)
    found = Findings(
        requests=sum(outcomes.values()),
        right=outcomes.get(Outcome.ANSWERED.value, 0),
        unexpected=sum(problem.count for problem in problems),
        growth_mb_per_hour=grown.get(ALL),
        growth_over_s=half[-1].at_s - half[0].at_s if half else 0.0,
        p99_drift=drifted,
        restarts=restarts(seen.memory),
        ending=seen.ending,
    )
    return SoakReport(
        schema_version=SCHEMA_VERSION,
        partial=seen.partial,
        started=started,
        load_s=seen.load_s,
        host=host,
        versions=versions,
        source=source,
        subject=served.subject,
        workload=workload.info,
        settings=settings,
        capacity_per_s=seen.capacity_per_s,
        offered_per_s=None if seen.capacity_per_s is None else settings.share * seen.capacity_per_s,
        generator_cpu_share=seen.cpu_s / seen.load_s if seen.load_s else None,
        times=seen.tally.times(),
        times_by_kind=seen.tally.times_by_kind(),
        outcomes=outcomes,
        windows=tuple(seen.windows),
        memory=tuple(seen.memory),
        growth_mb_per_hour=grown,
        p99_drift=drifted,
        problems=problems,
        server_said=seen.server_said,
        ending=seen.ending,
        verdicts=judge(found, settings.thresholds),
    )


class _Soak:
    """The load on a running server, and the clock that everything is written down by."""

    def __init__(self, server: ServedBundle, served: Served, settings: Settings, seen: Seen, show: Show) -> None:
        self._server, self._served, self._settings, self._seen, self._show = server, served, settings, seen, show
        self._seconds = 60 * settings.minutes
        self._began = time.monotonic()

    async def run(self) -> None:
        """Measure the rate, then put a share of it on the server for as long as asked, or until the server ends."""
        seen, seed = self._seen, self._settings.seed
        expected = self._served.expected
        async with Callers(self._server.addresses, expected, self._served.subject.fingerprint) as callers:
            measure_s = min(MEASURE_S, self._seconds / 10)
            seen.capacity_per_s = await measure_rate(callers, Mix(expected, seed), measure_s, seen.tally)
            if not seen.capacity_per_s:
                self._close_window()  # there is nothing to take a share of, and the verdict says so
                return
            cpu_began, self._began = time.process_time(), time.monotonic()
            rate = self._settings.share * seen.capacity_per_s
            mix = Mix(expected, seed)  # its own: how many the closed loop drew is chance
            arrivals = asyncio.ensure_future(
                Arrivals(callers, mix, rate, seen.tally, seed, self._clock).run(self._seconds)
            )
            try:
                await self._watch(arrivals)
                if arrivals.done():
                    arrivals.result()
            finally:
                arrivals.cancel()
                await asyncio.gather(arrivals, return_exceptions=True)
                seen.load_s = min(self._clock(), self._seconds)
                seen.cpu_s = time.process_time() - cpu_began
                self._close_window()

    def _clock(self) -> float:
        return time.monotonic() - self._began

    async def _watch(self, arrivals: asyncio.Future[None]) -> None:
        """Close a window and read the memory whenever one is over, until the load or the server has ended."""
        await self._remember()
        due = self._settings.window_s
        while not arrivals.done() and self._server.running:
            await asyncio.wait([arrivals], timeout=max(0.0, min(_TICK_S, due - self._clock())))
            if self._clock() >= due:
                self._close_window()
                await self._remember()
                due += self._settings.window_s
            self._show(min(self._clock(), self._seconds), self._word())

    def _close_window(self) -> None:
        window = self._seen.tally.close_window(self._clock())
        if window.requests:
            self._seen.windows.append(window)

    async def _remember(self) -> None:
        # In a thread: reading /proc takes milliseconds, which requests that are due must not wait for.
        processes = await asyncio.to_thread(self._server.processes)
        self._seen.memory.append(MemorySample(at_s=self._clock(), processes=processes))

    def _word(self) -> str:
        windows, problems = self._seen.windows, self._seen.tally.problems()
        times = windows[-1].times if windows else None
        p99 = f"p99 {times.p99_ms:.0f} ms, " if times is not None else ""
        unexpected = sum(problem.count for problem in problems)
        return f"{p99}{self._seen.memory[-1].total_mb:.0f} MB, {unexpected} unexpected"
