"""Measure the cost of a test without the noise of a busy machine and without shared fixtures."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

Spent = NDArray[np.float64]
"""Wall-clock and CPU seconds of this process and of the children it has waited for.

The smaller is a cost: a busy machine stretches wall-clock time alone, and several threads add up CPU time alone.
"""

_shared = np.zeros(2)
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
            _shared = _shared + _clocks() - start


def in_shared_work() -> bool:
    """Return whether the caller runs inside `shared_work`."""
    return _depth > 0


def _clocks() -> Spent:
    return np.array([time.monotonic(), sum(os.times()[:4])])
