"""Limit the work in flight. Requests over the limit are rejected immediately, with a measured retry-after."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mirror_runtime.errors import OverloadedError

_DECAY = 0.9
"""How much of the measured rate remains when work finishes: the last ten or so batches decide."""

_UNMEASURED_RETRY_S = 0.5
_SHORTEST_RETRY_S = 0.01
_LONGEST_RETRY_S = 10.0


class TokenBudget:
    """Counts the tokens of accepted requests that are not answered yet. Safe to use from several threads.

    Args:
        limit: most tokens in flight. With nothing in flight a request of any size is accepted, so that a large one is
            not rejected for ever.
        clock: seconds, monotonic.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight = 0
        self._since = 0.0  # when work last finished, or began after a rest
        self._done_tokens = 0.0
        self._done_s = 0.0

    @property
    def in_flight(self) -> int:
        """Tokens in flight now."""
        return self._in_flight

    def acquire(self, tokens: int) -> None:
        """Accept a request of `tokens` tokens.

        Raises:
            OverloadedError: it does not fit beside the requests in flight; carries when it might.
        """
        with self._lock:
            if not self._in_flight:
                self._since = self._clock()
            elif self._in_flight + tokens > self.limit:
                retry_after_s = self._retry_after_s()
                raise OverloadedError(
                    f"overloaded: {self._in_flight} tokens are in flight and {tokens} more would exceed {self.limit}; "
                    f"retry after {round(1000 * retry_after_s)} ms",
                    retry_after_s,
                )
            self._in_flight += tokens

    def release(self, tokens: int) -> None:
        """Release the tokens of an answered request."""
        with self._lock:
            now = self._clock()
            self._in_flight -= tokens
            self._done_tokens = _DECAY * self._done_tokens + tokens
            self._done_s = _DECAY * self._done_s + now - self._since
            self._since = now

    def _retry_after_s(self) -> float:
        """Estimate the seconds until half of the in-flight tokens finish, at the recent rate."""
        if not self._done_s:
            return _UNMEASURED_RETRY_S
        half_s = self._in_flight / 2 * self._done_s / max(self._done_tokens, 1.0)
        return min(max(half_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)
