"""Measure the cost of a test without the noise of a busy machine and without shared fixtures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Wall-clock and CPU seconds of this process and of the children it has waited for."""

    wall_s: float
    cpu_s: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(wall_s=self.wall_s - other.wall_s, cpu_s=self.cpu_s - other.cpu_s)

    def __add__(self, other: Spent) -> Spent:
        return Spent(wall_s=self.wall_s + other.wall_s, cpu_s=self.cpu_s + other.cpu_s)

    @property
    def seconds(self) -> float:
        """The smaller of the two.

        A busy machine stretches the wall-clock time alone, and several threads add up CPU time alone.
        """
        return min(self.wall_s, self.cpu_s)


_shared = Spent(wall_s=0.0, cpu_s=0.0)
_depth = 0


def now() -> Spent:
    """Read the clocks, less the time spent inside `shared_work`."""
    return _clocks() - _shared


@contextmanager
def shared_work() -> Iterator[None]:
    """Exclude the block from the cost of the running test: its result is shared by other tests."""
    global _shared, _depth
    start = _clocks()
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _shared += _clocks() - start


def in_shared_work() -> bool:
    """Return whether the caller runs inside `shared_work`."""
    return _depth > 0


def _clocks() -> Spent:
    return Spent(wall_s=time.monotonic(), cpu_s=sum(os.times()[:4]))
