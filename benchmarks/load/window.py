"""How requests end, and what the generator counts of those that ended within some time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Outcome(str, Enum):
    """How a request ended."""

    ANSWERED = "answered"
    """With the expected vectors, where they are known."""
    REFUSED = "bad request refused"
    """For the right reason."""
    CANCELLED = "cancelled"
    """By its caller, before an answer came."""
    WRONG_VECTOR = "wrong vector"
    NOT_REFUSED = "bad request answered"
    OTHER_REFUSAL = "bad request refused for another reason"
    GOOD_REFUSED = "good request refused"
    OVERLOADED = "overloaded"
    """Refused because the server had too much to do."""
    UNAVAILABLE = "unavailable"
    LATE = "no answer in time"
    FAILED = "server error"
    UNSENT = "not sent"
    """Too many requests were under way."""
    CRASHED = "caller failed"
    """With an exception that no caller of ours should see."""


EXPECTED = frozenset({Outcome.ANSWERED, Outcome.REFUSED, Outcome.CANCELLED})
"""How requests may end on a server that is not overloaded."""


@dataclass(frozen=True, kw_only=True)
class FirstSeen:
    """The first request that ended in some unexpected way.

    Attributes:
        at_s: when it ended, in seconds since the loop began.
        reason: the error's text.
    """

    at_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Window:
    """What ended within some time.

    Attributes:
        at_s: its end, in seconds since the loop began.
        seconds: its length.
        answered_ms: times of right answers by target and texts, such as "grpc 8". In an open loop they count from the
            moment the request was due.
        refused_ms: likewise, times until an overloaded server refused.
        lag_ms: how long after it was due each request was sent: the generator's own share of the times.
        outcomes: requests by `Outcome`.
        first: the first request of each unexpected outcome.
        cpu_s: processor time of the generator.
    """

    at_s: float
    seconds: float
    answered_ms: Mapping[str, tuple[float, ...]]
    refused_ms: tuple[float, ...]
    lag_ms: tuple[float, ...]
    outcomes: Mapping[str, int]
    first: Mapping[str, FirstSeen]
    cpu_s: float

    @property
    def times_ms(self) -> tuple[float, ...]:
        """Times of all right answers."""
        return tuple(time for times in self.answered_ms.values() for time in times)

    @property
    def requests(self) -> int:
        """Requests that ended."""
        return sum(self.outcomes.values())

    def count(self, *outcomes: Outcome) -> int:
        """Return how many requests ended in one of these ways."""
        return sum(self.outcomes.get(outcome.value, 0) for outcome in outcomes)

    @property
    def unexpected(self) -> int:
        """Requests that ended as none may on a server that is not overloaded."""
        return self.requests - self.count(*EXPECTED)

    @property
    def reason(self) -> str:
        """The error of the earliest unexpected end; "" if there is none."""
        return min(self.first.values(), key=lambda seen: seen.at_s).reason if self.first else ""


@dataclass(kw_only=True)
class Tally:
    """Collects ends of requests for one window after the other. It knows no clock."""

    answered_ms: dict[str, list[float]] = field(default_factory=dict)
    refused_ms: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    first: dict[str, FirstSeen] = field(default_factory=dict)
    last_answer_s: float = 0.0

    def answered(self, label: str, took_ms: float, at_s: float) -> None:
        """Count a right answer."""
        self.answered_ms.setdefault(label, []).append(took_ms)
        self.outcomes[Outcome.ANSWERED.value] += 1
        self.last_answer_s = at_s

    def ended(self, outcome: Outcome, at_s: float, reason: str = "") -> None:
        """Count another end, and keep the first reason of an unexpected one."""
        self.outcomes[outcome.value] += 1
        if outcome not in EXPECTED:
            self.first.setdefault(outcome.value, FirstSeen(at_s=at_s, reason=reason))

    def window(self, began_s: float, at_s: float, cpu_s: float) -> Window:
        """Return what was counted so far."""
        return Window(
            at_s=at_s,
            seconds=at_s - began_s,
            answered_ms={label: tuple(times) for label, times in self.answered_ms.items()},
            refused_ms=tuple(self.refused_ms),
            lag_ms=tuple(self.lag_ms),
            outcomes=dict(self.outcomes),
            first=dict(self.first),
            cpu_s=cpu_s,
        )
