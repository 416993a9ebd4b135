"""What a soak observes while it runs, as series and as measurements."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.load.window import EXPECTED, FirstSeen, Outcome, Window
from benchmarks.report.record import Better, Measurement
from benchmarks.report.statistics import percentile

ALL = "all"
"""Label of all requests, and of all processes, together."""


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """The server's resident memory at one moment.

    Attributes:
        at_s: seconds since the load began.
        server: tritonserver's process number; None while there is none.
        resident_mb: of the processes of each name, and of `ALL`, in 10^6 bytes. Shared pages count in each process.
    """

    at_s: float
    server: int | None
    resident_mb: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class WindowFigures:
    """One window: its end since the load began, its unexpected ends, times of right answers, and how late it sent."""

    at_s: float
    unexpected: int
    p50_ms: float | None
    p99_ms: float | None
    lag_p99_ms: float | None


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
        problems: requests by unexpected `Outcome`, those before the load included.
        first: the first request of each of them.
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
    problems: Counter[str] = field(default_factory=Counter)
    first: dict[str, FirstSeen] = field(default_factory=dict)
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
        for label, answered_ms in window.answered_ms.items():
            self.times_ms.setdefault(label, array("f")).extend(answered_ms)
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
            self.problems[outcome] += window.outcomes[outcome]
            self.first.setdefault(outcome, FirstSeen(first.at_s, prefix + first.reason))

    @property
    def unexpected(self) -> int:
        """Requests that ended as none may."""
        return sum(self.problems.values())

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
        capacity = [] if self.capacity_per_s is None else [self.capacity_per_s]
        answered = [w for w in self.windows if w.p99_ms is not None and w.p50_ms is not None]
        names = dict.fromkeys(name for sample in self.memory for name in sample.resident_mb)
        rows: list[tuple[str, str, Sequence[float], dict[str, str]]] = [
            ("requests per second", "1/s", capacity, {"loop": "closed"}),
            ("requests per second", "1/s", [share * rate for rate in capacity], {"loop": "open"}),
            *(("time per request", "ms", times, {"request": label}) for label, times in self.times()),
            *(
                ("requests", "", [count], {"outcome": outcome, "expected": "yes" if outcome in EXPECTED else "no"})
                for outcome, count in self.outcomes.items()
            ),
            ("end of a window", "s", [w.at_s for w in answered], {}),
            ("p50 of a window", "ms", [w.p50_ms or 0.0 for w in answered], {}),
            ("p99 of a window", "ms", [w.p99_ms or 0.0 for w in answered], {}),
            ("sending lag p99", "ms", [w.lag_p99_ms for w in self.windows if w.lag_p99_ms is not None], {}),
            ("time of a memory sample", "s", [sample.at_s for sample in self.memory], {}),
            *(
                ("resident memory", "MB", [s.resident_mb.get(name, 0.0) for s in self.memory], {"process": name})
                for name in names
            ),
        ]
        for metric, unit, samples, conditions in rows:
            if samples:
                yield Measurement(
                    suite="soak", party=party, metric=metric, unit=unit, samples=tuple(map(float, samples)),
                    better=Better.LOWER if metric == "time per request" else Better.NEITHER, conditions=conditions,
                )  # fmt: skip
