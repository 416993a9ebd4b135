"""Counts how a soak's requests end, window by window. Knows no clock and no server."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from enum import Enum

from benchmarks.soak_figures import times_of
from benchmarks.soak_results import Problem, Times, Window
from benchmarks.summary import percentile


class Outcome(str, Enum):
    """How a request ended."""

    ANSWERED = "answered"
    """With vectors that are the expected ones."""
    REFUSED = "bad request refused"
    """And told what is wrong with it."""
    CANCELLED = "cancelled"
    """By us, before an answer came."""
    WRONG_VECTOR = "wrong vector"
    NOT_REFUSED = "bad request answered"
    OTHER_REFUSAL = "bad request refused for another reason"
    GOOD_REFUSED = "good request refused"
    OVERLOADED = "overloaded"
    """Refused because there was too much to do, which at the share of a soak there is not."""
    UNAVAILABLE = "unavailable"
    LATE = "no answer in time"
    FAILED = "server error"
    UNSENT = "not sent"
    """Too many were under way."""
    CRASHED = "caller failed"
    """With an exception that a caller of ours should not see."""


EXPECTED = frozenset({Outcome.ANSWERED, Outcome.REFUSED, Outcome.CANCELLED})
"""How requests may end. Any other is a problem."""


class Tally:
    """Collects ends of requests. Times are kept as 4 bytes each: a day of 100 a second is 35 MB."""

    def __init__(self) -> None:
        self._by_kind: dict[str, array[float]] = {}
        self._window_ms: list[float] = []
        self._window_late_ms: list[float] = []
        self._window_outcomes: Counter[str] = Counter()
        self._window_began_s = 0.0
        self._problems: dict[Outcome, Problem] = {}

    def sent(self, late_ms: float) -> None:
        """Note that a request was sent, that long after it was due."""
        self._window_late_ms.append(late_ms)

    def answered(self, kind: str, took_ms: float) -> None:
        """Note a right answer to a request of a kind."""
        self._by_kind.setdefault(kind, array("f")).append(took_ms)
        self._window_ms.append(took_ms)
        self._window_outcomes[Outcome.ANSWERED.value] += 1

    def ended(self, outcome: Outcome, at_s: float, reason: str = "") -> None:
        """Note any other end; of an unexpected one the first reason is kept."""
        self._window_outcomes[outcome.value] += 1
        if outcome in EXPECTED:
            return
        before = self._problems.get(outcome)
        self._problems[outcome] = Problem(
            kind=outcome.value,
            count=1 if before is None else before.count + 1,
            first_at_s=at_s if before is None else before.first_at_s,
            first_reason=reason if before is None else before.first_reason,
        )

    def close_window(self, at_s: float) -> Window:
        """Give what was noted since the last call, and begin anew."""
        window = Window(
            at_s=at_s,
            seconds=at_s - self._window_began_s,
            requests=self._window_outcomes.total(),
            outcomes=dict(self._window_outcomes),
            times=times_of(self._window_ms),
            sent_late_p99_ms=percentile(self._window_late_ms, 99) if self._window_late_ms else None,
        )
        self._window_ms, self._window_late_ms, self._window_outcomes = [], [], Counter()
        self._window_began_s = at_s
        return window

    def times(self) -> Times | None:
        """Give the times of all right answers."""
        return times_of([took for samples in self._by_kind.values() for took in samples])

    def times_by_kind(self) -> Mapping[str, Times]:
        """Give the times of right answers to each kind of request."""
        figures = {kind: times_of(samples) for kind, samples in sorted(self._by_kind.items())}
        return {kind: times for kind, times in figures.items() if times is not None}

    def problems(self) -> tuple[Problem, ...]:
        """Give the unexpected ends, most frequent first."""
        return tuple(sorted(self._problems.values(), key=lambda problem: -problem.count))
