"""What a soak observes while it runs, as series and as measurements."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.load.window import EXPECTED, Outcome, Window
from benchmarks.report.record import Better, Measurement
from benchmarks.report.statistics import percentile

ALL = "all"
"""Label of all requests, and of all processes, together."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of the server.

    Attributes:
        name: "mirror serve", "tritonserver", "model" for what runs the model, or "other".
        pid: its number.
        resident_mb: its resident memory in 10^6 bytes. Pages that processes share count in each.
    """

    name: str
    pid: int
    resident_mb: float


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """The server's processes at one moment, in seconds since the load began."""

    at_s: float
    processes: tuple[Process, ...]

    def by_name(self) -> dict[str, float]:
        """Add up the resident memory of the processes of each name, and of `ALL`, in 10^6 bytes."""
        sums: dict[str, float] = {}
        for process in self.processes:
            for name in (process.name, ALL):
                sums[name] = sums.get(name, 0.0) + process.resident_mb
        return sums


@dataclass(frozen=True, kw_only=True)
class WindowFigures:
    """One window.

    Attributes:
        at_s: its end, in seconds since the load began.
        unexpected: requests that ended as none may.
        p50_ms: of right answers; None if there were none.
        p99_ms: likewise.
        lag_p99_ms: how late requests were sent; None if none was sent.
    """

    at_s: float
    unexpected: int
    p50_ms: float | None
    p99_ms: float | None
    lag_p99_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Requests that ended in one unexpected way.

    Attributes:
        outcome: an `Outcome`.
        count: requests.
        first_at_s: when the first of them ended, in seconds since the load began.
        first_reason: the error of that one.
    """

    outcome: str
    count: int
    first_at_s: float
    first_reason: str


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The server's reaction to SIGTERM.

    Attributes:
        by_itself: the server had ended before.
        status: its exit status; None if it did not end in time and was killed.
        seconds: from the signal to the end.
        leftovers: processes, shared memory and files that it left behind.
    """

    by_itself: bool
    status: int | None
    seconds: float
    leftovers: tuple[str, ...]


@dataclass(kw_only=True)
class Observations:
    """What a soak has observed so far. It is complete at any moment, so an interrupted run has a report.

    Attributes:
        windows: that had a request.
        memory: of the server's processes.
        times_ms: of right answers by request, such as "grpc 8". 4 bytes each: a day of 100 a second is 35 MB.
        outcomes: requests by `Outcome`.
        problems: by outcome.
        capacity_per_s: rate of a closed loop before the load; None if it was not measured.
        load_s: how long requests have arrived.
        cpu_s: processor time of the generator meanwhile.
        partial: the run was interrupted.
        server_log: what `mirror serve` wrote to standard error.
        ending: None if the server never ran.
    """

    windows: list[WindowFigures] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    times_ms: dict[str, array[float]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: dict[str, Problem] = field(default_factory=dict)
    capacity_per_s: float | None = None
    load_s: float = 0.0
    cpu_s: float = 0.0
    partial: bool = False
    server_log: tuple[str, ...] = ()
    ending: Ending | None = None

    def add(self, window: Window) -> None:
        """Add a window of the load."""
        self.cpu_s += window.cpu_s
        if not window.requests:
            return
        for label, times in window.answered_ms.items():
            self.times_ms.setdefault(label, array("f")).extend(times)
        self.outcomes.update(window.outcomes)
        self.add_problems(window)
        times = window.times_ms
        self.windows.append(
            WindowFigures(
                at_s=window.at_s,
                unexpected=window.unexpected,
                p50_ms=percentile(times, 50) if times else None,
                p99_ms=percentile(times, 99) if times else None,
                lag_p99_ms=percentile(window.lag_ms, 99) if window.lag_ms else None,
            )
        )

    def add_problems(self, window: Window, prefix: str = "") -> None:
        """Add the unexpected ends of a window; the first reason of each is kept."""
        for outcome, first in window.first.items():
            before = self.problems.get(outcome)
            self.problems[outcome] = Problem(
                outcome=outcome,
                count=window.outcomes[outcome] + (0 if before is None else before.count),
                first_at_s=first.at_s if before is None else before.first_at_s,
                first_reason=prefix + first.reason if before is None else before.first_reason,
            )

    @property
    def unexpected(self) -> int:
        """Requests that ended as none may."""
        return sum(problem.count for problem in self.problems.values())

    @property
    def answered(self) -> int:
        """Requests with a right answer."""
        return self.outcomes[Outcome.ANSWERED.value]

    def times(self) -> Iterator[tuple[str, Sequence[float]]]:
        """Yield the times of right answers: of all requests, then by protocol and number of texts."""
        if self.times_ms:
            yield ALL, [time for times in self.times_ms.values() for time in times]
        yield from sorted(self.times_ms.items(), key=lambda item: (item[0].split()[0], int(item[0].split()[1])))

    def measurements(self, party: str, share: float) -> Iterator[Measurement]:
        """Yield everything as measurements of suite "soak".

        Args:
            party: engine and precision that served.
            share: of the capacity that was offered.
        """

        def one(metric: str, unit: str, samples: Sequence[float], **conditions: str) -> Iterator[Measurement]:
            better = Better.LOWER if metric == "time per request" else Better.NEITHER
            if samples:
                yield Measurement(
                    suite="soak",
                    party=party,
                    metric=metric,
                    unit=unit,
                    samples=tuple(map(float, samples)),
                    better=better,
                    conditions=conditions,
                )

        if self.capacity_per_s is not None:
            yield from one("requests per second", "1/s", [self.capacity_per_s], loop="closed")
            yield from one("requests per second", "1/s", [share * self.capacity_per_s], loop="open")
        for label, times in self.times():
            yield from one("time per request", "ms", times, request=label)
        for outcome, count in self.outcomes.items():
            expected = "yes" if outcome in {end.value for end in EXPECTED} else "no"
            yield from one("requests", "", [count], outcome=outcome, expected=expected)
        answered = [window for window in self.windows if window.p99_ms is not None and window.p50_ms is not None]
        yield from one("end of a window", "s", [window.at_s for window in answered])
        yield from one("p50 of a window", "ms", [window.p50_ms or 0.0 for window in answered])
        yield from one("p99 of a window", "ms", [window.p99_ms or 0.0 for window in answered])
        yield from one("sending lag p99", "ms", [w.lag_p99_ms for w in self.windows if w.lag_p99_ms is not None])
        yield from one("time of a memory sample", "s", [sample.at_s for sample in self.memory])
        sums = [sample.by_name() for sample in self.memory]
        for name in dict.fromkeys(name for sample in sums for name in sample):
            yield from one("resident memory", "MB", [sample.get(name, 0.0) for sample in sums], process=name)
