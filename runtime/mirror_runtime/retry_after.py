"""Estimate when an overloaded queue will have room again, from its recent rate. A leaf: imports nothing of ours."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_MEMORY_S = 2.0
"""Busy seconds after which a measured rate has lost most of its weight."""

_UNMEASURED_S = 0.5
_SHORTEST_S = 0.01
_LONGEST_S = 10.0


class RetryEstimator:
    """Tracks the work in flight, and estimates when half of it will have finished. Not safe for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight = 0
        self._since = 0.0  # when work last finished, or began after an idle time
        self._finished = 0.0
        self._finished_s = 0.0

    @property
    def in_flight(self) -> int:
        """Work in flight now, in the caller's unit, such as tokens."""
        return self._in_flight

    @property
    def rate(self) -> float:
        """Work that finishes in a busy second, lately; 0 before any has finished."""
        return self._finished / self._finished_s if self._finished_s else 0.0

    def enter(self, amount: int) -> None:
        """Add work."""
        if not self._in_flight:
            self._since = self._clock()
        self._in_flight += amount

    def finish(self, amount: int) -> None:
        """Remove finished work, and update the rate."""
        now = self._clock()
        elapsed = now - self._since
        kept = math.exp(-elapsed / _MEMORY_S)
        self._in_flight -= amount
        self._finished = kept * self._finished + amount
        self._finished_s = kept * self._finished_s + elapsed
        self._since = now

    def drop(self, amount: int) -> None:
        """Remove work that was cancelled or failed, which does not count for the rate."""
        self._in_flight -= amount

    def retry_after_s(self) -> float:
        """Estimate the seconds until half of the work in flight finishes, at the recent rate: 0.01 to 10.

        Before any work has finished, the estimate is 0.5.
        """
        if not self._finished_s:
            return _UNMEASURED_S
        half_s = self._in_flight / 2 * self._finished_s / max(self._finished, 1.0)
        return min(max(half_s, _SHORTEST_S), _LONGEST_S)
