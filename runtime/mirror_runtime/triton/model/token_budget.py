"""Limit the work in flight. Requests over the limit are rejected immediately, with a measured retry-after."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mirror_runtime.errors import OverloadedError
from mirror_runtime.retry_after import RetryEstimator


class TokenBudget:
    """Counts the tokens of accepted requests that are not answered yet. Safe to use from several threads.

    With nothing in flight a request of any size is accepted, so that a large one is not rejected for ever.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._work = RetryEstimator(clock)

    @property
    def in_flight(self) -> int:
        """Tokens in flight now."""
        return self._work.in_flight

    def acquire(self, tokens: int) -> None:
        """Accept a request, or raise an `OverloadedError` with the time when it might fit."""
        with self._lock:
            in_flight = self._work.in_flight
            if in_flight and in_flight + tokens > self.limit:
                retry_after_s = self._work.retry_after_s()
                raise OverloadedError(
                    f"overloaded: {in_flight} tokens are in flight and {tokens} more would exceed {self.limit}; "
                    f"retry after {round(1000 * retry_after_s)} ms",
                    retry_after_s,
                )
            self._work.enter(tokens)

    def release(self, tokens: int) -> None:
        """Release the tokens of an answered request."""
        with self._lock:
            self._work.finish(tokens)
