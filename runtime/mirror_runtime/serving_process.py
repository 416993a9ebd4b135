"""What a process that serves asks of its system: the signals to stop, and open files.

A leaf: imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextlib.contextmanager
def stop_signals_handled(handler: Any) -> Iterator[None]:
    """Handle the signals to stop during the block. Ignored ones stay so, as `nohup` and a shell's `&` want it."""
    chosen = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in chosen}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def allow_open_files(wanted: int) -> int:
    """Raise this process's limit on open files as far as needed and possible; return how many it may open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return soft
