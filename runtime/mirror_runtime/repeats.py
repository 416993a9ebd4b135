"""A log that states a thing a few times and then counts it, so that a bad caller cannot fill a disk.

A leaf: imports nothing of ours.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

WINDOW_S = 10.0
"""A thing is logged `BURST` times in this time; the rest is one line at its end."""

BURST = 5
"""Enough request ids to find a failure by, and at 200 bytes a line 9 MB a day of one thing that never stops."""


class RepeatFilter(logging.Filter):
    """Drops repeats: records of the same logger, level, unformatted message and types of exceptions."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, burst: int = BURST, window_s: float = WINDOW_S
    ) -> None:
        super().__init__()
        self._clock, self._burst, self._window_s = clock, burst, window_s
        self._began = clock()
        self._seen: Counter[tuple[str, int, str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be logged."""
        if record.name == __name__:
            return True
        self.summarize()
        thing = (record.name, record.levelno, str(record.msg)[:100], _exceptions(record))
        self._seen[thing] += 1
        return self._seen[thing] <= self._burst

    def summarize(self, *, now: bool = False) -> None:
        """Log how often things were repeated, once the window has ended, or `now`."""
        if not now and self._clock() - self._began < self._window_s:
            return
        seen, self._seen, self._began = self._seen, Counter(), self._clock()
        for (name, level, message, kind), times in seen.items():
            if times > self._burst:
                more = (times - self._burst, name, message.strip(), kind)
                logging.getLogger(__name__).log(level, "%d more of %s: %s%s", *more)


def _exceptions(record: logging.LogRecord) -> str:
    """Return the types of a record's exceptions, as a suffix."""
    found = [*(record.args if isinstance(record.args, tuple) else ()), *(record.exc_info or ())[1:2]]
    kinds = [type(one).__name__ for one in found if isinstance(one, BaseException)]
    return f" ({', '.join(kinds)})" if kinds else ""


def limit_repeats() -> RepeatFilter:
    """Put a filter on the root logger's handlers, and return it."""
    repeats = RepeatFilter()
    for handler in logging.getLogger().handlers:
        handler.addFilter(repeats)
    return repeats
