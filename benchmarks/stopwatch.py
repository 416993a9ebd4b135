"""Seconds of one piece of work, run by run."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds_of(work: Callable[[], object], runs: int) -> tuple[float, ...]:
    """Run some work so many times, and give the seconds of each."""
    samples = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        samples.append(time.perf_counter() - began)
    return tuple(samples)
