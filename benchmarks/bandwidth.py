"""How fast the machine moves memory, and with that and the ceilings how short a single text can be at best."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.machine_results import Bandwidth, Ceiling
from benchmarks.stopwatch import seconds_of
from mirror_runtime.bundle import Precision
from mirror_runtime.host import usable_cores

FEWEST_BYTES = 256 * 2**20
CACHES = 8
"""An array is this many times as large as the last cache: what a cache still holds of it is then little."""

REPETITIONS = 6

WEIGHT_BYTES = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP16: 2, Precision.INT8: 1}

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def measure_bandwidth(array_bytes: int | None = None) -> Bandwidth:
    """Let every usable core read, then copy, its own part of an array.

    Args:
        array_bytes: None for one that is far larger than the last cache.
    """
    cache, threads = last_cache_bytes(), usable_cores()
    count = (array_bytes or max(FEWEST_BYTES, CACHES * cache)) // 8
    source, target = np.ones(count, np.int64), np.ones(count, np.int64)  # written: pages that are never are not there
    froms, tos = np.array_split(source, threads), np.array_split(target, threads)
    with ThreadPoolExecutor(threads) as pool:
        # "or" is the reduction that asks least of the core itself; numpy lets other threads run meanwhile.
        reads = _samples(lambda: list(pool.map(np.bitwise_or.reduce, froms)))
        copies = _samples(lambda: list(pool.map(np.copyto, tos, froms)))
    return Bandwidth(
        threads=threads,
        array_bytes=source.nbytes,
        cache_bytes=cache,
        read_samples_s=reads,
        copy_samples_s=copies,
        read_gb_per_s=source.nbytes / min(reads) / 1e9,
        copy_gb_per_s=2 * source.nbytes / min(copies) / 1e9,
    )


def floor_ms(
    tokens: int, precision: Precision, flop_per_token: int | None, ceiling: Ceiling | None, bandwidth: Bandwidth | None
) -> float | None:
    """Give the milliseconds below which a text cannot be encoded here, or None where too little is known.

    It is the longer of two: the text's matrix products at the ceiling's rate, and reading the weights of these
    matrices from memory, as far as they are more than the last cache holds from one text to the next.
    """
    if flop_per_token is None or ceiling is None or bandwidth is None:
        return None
    compute_s = tokens * flop_per_token / (ceiling.gflop_per_s * 1e9)
    weights = flop_per_token // 2 * WEIGHT_BYTES[precision]  # a token multiplies and adds once for each weight
    memory_s = max(0, weights - bandwidth.cache_bytes) / (bandwidth.read_gb_per_s * 1e9)
    return 1e3 * max(compute_s, memory_s)


def last_cache_bytes(folder: Path = _CPU) -> int:
    """Give the size of the largest cache of the first core; 0 where the system does not say."""
    sizes = [file.read_text(encoding="ascii").strip() for file in folder.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=0)


def _samples(work: Callable[[], object]) -> tuple[float, ...]:
    """Time some repetitions after one untimed."""
    work()
    return seconds_of(work, REPETITIONS)
