"""How much work may be in flight. What comes on top is refused at once, with the time after which to try again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mirror_runtime.errors import OverloadedError

_MEMORY = 0.9
"""How much of the measured rate stays when work is finished: the last ten or so batches decide."""

_FIRST_HINT_S = 0.5
_LEAST_HINT_S = 0.01
_MOST_HINT_S = 10.0


class TokenBudget:
    """Counts the tokens of requests that were taken and not answered yet. Safe to use from several threads.

    Args:
        limit: tokens that may be in flight. A request that finds nothing in flight is taken whatever its size, so that
            a large one is never refused for ever.
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

    def enter(self, tokens: int) -> None:
        """Take a request of so many tokens.

        Raises:
            OverloadedError: it does not fit beside what is in flight; says when it might.
        """
        with self._lock:
            if not self._in_flight:
                self._since = self._clock()
            elif self._in_flight + tokens > self.limit:
                after = self._hint()
                raise OverloadedError(
                    f"overloaded: {self._in_flight} tokens are in flight and {tokens} more would exceed {self.limit}; "
                    f"retry after {round(1000 * after)} ms",
                    after,
                )
            self._in_flight += tokens

    def leave(self, tokens: int) -> None:
        """Let a request's tokens go, when it is answered."""
        with self._lock:
            now = self._clock()
            self._in_flight -= tokens
            self._done_tokens = _MEMORY * self._done_tokens + tokens
            self._done_s = _MEMORY * self._done_s + now - self._since
            self._since = now

    def _hint(self) -> float:
        """Give the seconds in which half of what is in flight will have been answered, at the rate of late."""
        if not self._done_s:
            return _FIRST_HINT_S
        return min(max(self._in_flight / 2 * self._done_s / max(self._done_tokens, 1.0), _LEAST_HINT_S), _MOST_HINT_S)
