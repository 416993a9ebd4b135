"""How `mirror serve` drains the models of its server, through files in its workspace.

    mirror serve ──writes FILE──▶ each model's process ──writes FILE-PID──▶ mirror serve

Replacing the model by one that rejects requests takes Triton a second longer, and the old process's end another one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

DRAIN_VARIABLE = "MIRROR_DRAIN_FILE"
"""The environment variable that names the file."""

_POLL_S = 0.05


def drained_file(file: Path, pid: int) -> Path:
    """Return the file with which a process says that it has answered every request."""
    return file.with_name(f"{file.name}-{pid}")


class DrainWatch:
    """Waits in a thread for the file that asks to drain, where the environment names one.

    `drain` rejects new requests, and returns when the accepted ones are answered.
    """

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mirror-drain", daemon=True)
        if DRAIN_VARIABLE in os.environ:
            self._thread.start()

    def close(self) -> None:
        """Wait no longer."""
        self._ended.set()

    def _watch(self) -> None:
        file = Path(os.environ[DRAIN_VARIABLE])
        while not self._ended.wait(_POLL_S):
            if file.exists():
                self._drain()
                drained_file(file, os.getpid()).touch()
                return
