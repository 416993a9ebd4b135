"""Counters of an encoder, shared by threads, and the snapshot that callers read. A leaf."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The work of an encoder since it was loaded.

    Attributes:
        texts: texts received, without those that the vector cache had.
        failed: texts with an error.
        truncated: texts that lost tokens.
        tokens: tokens computed, without padding.
        slots: positions computed, empty ones included; `tokens / slots` is the fill of the rows.
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
        """Return the share of computed positions that held a token; 0 before anything ran."""
        return self.tokens / self.slots if self.slots else 0.0


class Counters:
    """Sums of the fields of `Stats`. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = dict(vars(Stats()))

    def add(self, **more: float) -> None:
        """Add amounts to the named fields of `Stats`."""
        with self._lock:
            for name, amount in more.items():
                self._sums[name] += amount

    def snapshot(self) -> Stats:
        """Return the current sums."""
        with self._lock:
            return Stats(**self._sums)
