"""How fast the machine moves memory, and with that and the ceilings the least time that a single text can take."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.machine.products import seconds_of
from benchmarks.report.record import Better, Measurement
from mirror_runtime.bundle import Precision
from mirror_runtime.host import usable_cores

FEWEST_BYTES = 256 * 2**20
CACHES = 8
"""An array is this many times as large as the last cache, so that little of it stays cached."""

REPETITIONS = 6

WEIGHT_BYTES = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP16: 2, Precision.INT8: 1}

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def measure_bandwidth(array_bytes: int | None = None) -> list[Measurement]:
    """Measure all usable cores reading, then copying, each its own part of an array. A copied byte counts twice.

    Args:
        array_bytes: None for an array that is far larger than the last cache.
    """
    cache, threads = last_cache_bytes(), usable_cores()
    count = (array_bytes or max(FEWEST_BYTES, CACHES * cache)) // 8
    source, target = np.ones(count, np.int64), np.ones(count, np.int64)  # written, so that their pages exist
    froms, tos = np.array_split(source, threads), np.array_split(target, threads)

    def rate(metric: str, passes: int, work: Callable[[], object]) -> Measurement:
        work()
        return Measurement(
            suite="ceilings",
            party="memory",
            conditions={"threads": threads, "array MiB": source.nbytes / 2**20, "last cache MiB": cache / 2**20},
            metric=metric,
            unit="GB/s",
            samples=tuple(passes * source.nbytes / seconds / 1e9 for seconds in seconds_of(work, REPETITIONS)),
            better=Better.NEITHER,
        )

    with ThreadPoolExecutor(threads) as pool:
        # "or" is the reduction that costs the core least; numpy lets other threads run meanwhile.
        read = rate("memory read", 1, lambda: list(pool.map(np.bitwise_or.reduce, froms)))
        copied = rate("memory copied", 2, lambda: list(pool.map(np.copyto, tos, froms)))
    return [read, copied]


def floor_ms(
    tokens: int, precision: Precision, *, flop_per_token: int, gflop_per_s: float, memory: Measurement
) -> float:
    """Return the milliseconds below which a text cannot be encoded here.

    It is the longer of two: the text's matrix products at the ceiling's rate, and reading the weights of these
    matrices from memory, as far as they exceed what the last cache keeps from one text to the next.

    Args:
        tokens: of the text.
        precision: of the weights.
        flop_per_token: of the encoder's matrix products.
        gflop_per_s: the ceiling.
        memory: "memory read" of `measure_bandwidth`.
    """
    compute_s = tokens * flop_per_token / (gflop_per_s * 1e9)
    weights = flop_per_token // 2 * WEIGHT_BYTES[precision]  # a token multiplies and adds once for each weight
    cached = float(memory.conditions["last cache MiB"]) * 2**20
    memory_s = max(0.0, weights - cached) / (memory.figure("max") * 1e9)
    return 1e3 * max(compute_s, memory_s)


def last_cache_bytes(folder: Path = _CPU) -> int:
    """Return the size of the largest cache of the first core; 0 where the system does not state it."""
    sizes = [file.read_text(encoding="ascii").strip() for file in folder.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=0)
