"""The log records of this package in Triton's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from mirror_runtime.repeats import RepeatFilter

_WINDOW_S = 60.0
_BURST = 1
"""Triton's log has no request ids to find, and a failure has a traceback."""


class TritonHandler(logging.Handler):
    """Writes warnings and errors to Triton's log, each thing once a minute; see `RepeatFilter`."""

    def __init__(self, pb_utils: Any, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._logger = pb_utils.Logger
        self.addFilter(RepeatFilter(clock, burst=_BURST, window_s=_WINDOW_S))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        log = self._logger.log_error if record.levelno >= logging.ERROR else self._logger.log_warn
        log(f"embed: {self.format(record)}")
