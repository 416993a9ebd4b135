"""The log records of this package in Triton's log, each said once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

SILENT_S = 60.0
"""How long a record is not repeated."""


class TritonHandler(logging.Handler):
    """Writes warnings and errors to Triton's log. Records that repeat one are counted, and told with the next one."""

    def __init__(self, pb_utils: Any, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._logger, self._clock = pb_utils.Logger, clock
        self._said: dict[tuple[str, str], tuple[float, int]] = {}  # when, and how many have not been said since

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless it repeats one of the last minute."""
        now, cause = self._clock(), record.exc_info and record.exc_info[1]
        key = (record.msg, type(cause).__name__)
        at, left_out = self._said.get(key, (now - SILENT_S, 0))
        if now - at < SILENT_S:
            self._said[key] = (at, left_out + 1)
            return
        self._said[key] = (now, 0)
        log = self._logger.log_error if record.levelno >= logging.ERROR else self._logger.log_warn
        log(f"embed: {self.format(record)}" + (f"\n(and {left_out} more like it before)" if left_out else ""))
