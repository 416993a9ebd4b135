"""How requests end, and what the generator counts of those that ended within some time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple


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


class FirstSeen(NamedTuple):
    """The first request that ended in some unexpected way: when, in seconds since the loop began, and the error."""

    at_s: float
    reason: str


@dataclass(kw_only=True)
class Window:
    """Counts what ends within some time. It knows no clock.

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
        last_answer_s: when the last right answer came, in seconds since the loop began.
    """

    at_s: float = 0.0
    seconds: float = 0.0
    answered_ms: dict[str, list[float]] = field(default_factory=dict)
    refused_ms: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    first: dict[str, FirstSeen] = field(default_factory=dict)
    cpu_s: float = 0.0
    last_answer_s: float = 0.0

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Window:
        """Read what `vars` and JSON made of a window."""
        first = {outcome: FirstSeen(*seen) for outcome, seen in data["first"].items()}
        return cls(**{**data, "outcomes": Counter(data["outcomes"]), "first": first})

    def answer(self, label: str, took_ms: float, at_s: float) -> None:
        """Count a right answer."""
        self.answered_ms.setdefault(label, []).append(took_ms)
        self.outcomes[Outcome.ANSWERED.value] += 1
        self.last_answer_s = at_s

    def end(self, outcome: Outcome, at_s: float, reason: str = "") -> None:
        """Count another end, and keep the first reason of an unexpected one."""
        self.outcomes[outcome.value] += 1
        if outcome not in EXPECTED:
            self.first.setdefault(outcome.value, FirstSeen(at_s, reason))

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
