"""What an encoder has done: counters that threads share, and the snapshot that callers read. A leaf."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an encoder has done since it was loaded.

    Attributes:
        texts: texts given.
        failed: texts that got an error.
        truncated: texts that lost tokens.
        tokens: useful tokens executed.
        slots: token places executed, empty ones included; `tokens / slots` is the fill of the rows.
        executions: batches run.
        tokenize_s: seconds spent tokenising.
        pack_s: seconds spent packing.
        infer_s: seconds spent in the engine, summed over its streams.
        unpack_s: seconds spent collecting vectors.
    """

    texts: int = 0
    failed: int = 0
    truncated: int = 0
    tokens: int = 0
    slots: int = 0
    executions: int = 0
    tokenize_s: float = 0.0
    pack_s: float = 0.0
    infer_s: float = 0.0
    unpack_s: float = 0.0

    @property
    def fill(self) -> float:
        """Share of the executed token places that held a token; 0 before anything ran."""
        return self.tokens / self.slots if self.slots else 0.0


class Counters:
    """Sums that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = dict(vars(Stats()))

    def add(self, **more: float) -> None:
        """Add to the fields of `Stats` that are named."""
        with self._lock:
            for name, amount in more.items():
                self._sums[name] += amount

    def snapshot(self) -> Stats:
        """Give the sums of this moment."""
        with self._lock:
            return Stats(**self._sums)
