"""When a refused request is tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from mirror_runtime.errors import OverloadedError, UnavailableError

FIRST_S = 0.05
MOST_S = 2.0


class Backoff:
    """The pauses of one request that a server refuses: the server's hint, and full jitter that doubles up to a bound.

    Full jitter spreads clients that were refused together, so that they do not come back together.

    Args:
        give_up_at: of the monotonic clock; no try begins after it.
        jitter: gives a number between its arguments.
    """

    def __init__(self, give_up_at: float, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._give_up_at = give_up_at
        self._jitter = jitter
        self._tries = 0

    def pause(self, refusal: OverloadedError | UnavailableError) -> float:
        """Give the seconds to wait before the next try.

        Raises:
            OverloadedError: `refusal` itself, when the next try would come too late.
            UnavailableError: likewise.
        """
        hint = refusal.retry_after_s if isinstance(refusal, OverloadedError) else None
        seconds = (hint or 0.0) + self._jitter(0.0, min(MOST_S, FIRST_S * 2**self._tries))
        if time.monotonic() + seconds >= self._give_up_at:
            raise refusal
        self._tries += 1
        return seconds
