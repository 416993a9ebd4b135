"""What the machine could do at best, before the figures, and what it does at this moment, beside them.

- Ceilings: how fast the engine's own library multiplies bare matrices. Only the encoder's matrix products on useful
  tokens count; attention, embeddings and elementwise work are left out, so that a share of 1 is out of reach.
- Floors: the least time that a single text can take, by its ceiling and by how fast memory is read.
- Reference work: a machine that others use too may be a fifth slower for some seconds, and with it whatever runs then.
  The same products, timed in turn with what is measured, slow down with it, and `benchmarks.compare` divides by them.
  They have as many rows and streams as the measured work, and run no code of the runtime. What slows both is hidden,
  such as another release of the library: absolute times stand beside every ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import Progress

from benchmarks.machine.products import Sizes, repeated, seconds_of
from benchmarks.plan import EncoderShape, Plan, Suite, Variant, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Measurement
from benchmarks.report.statistics import median
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import TOKEN_BUDGET

SUITE = "ceilings"
METRIC = "matrix products"
REPETITIONS = 8
QUICK_REPETITIONS = 1

MEMORY_REPETITIONS = 6
FEWEST_BYTES = 256 * 2**20
CACHES = 8
"""The array that is read is this many times as large as the last cache, so that little of it stays cached."""

WEIGHT_BYTES = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP16: 2, Precision.INT8: 1}

BATCH_RUNS, SINGLE_RUNS = 3, 15
"""Runs of reference work whose median counts: a twentieth of a second or less, beside a round of a quick run."""

Reference = Callable[[], float]
"""Measures the seconds that reference work takes now."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def measure_ceilings(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Measure memory bandwidth, then one ceiling for each variant; one that cannot be measured is a failure."""
    if plan.shape is None:
        recorder.fail(SUITE, "all", "the bundle's config.json does not state the encoder's sizes")
        return
    repetitions = QUICK_REPETITIONS if plan.quick else REPETITIONS
    with steps(progress, SUITE, 1 + len(plan.variants)) as done:
        measure_memory(recorder, max(FEWEST_BYTES, CACHES * last_cache_bytes()))
        done("memory")
        for variant in plan.variants:
            with recorder.failing(SUITE, variant.name):
                measure_ceiling(recorder, variant.engine, variant.precision, plan.shape, repetitions)
            done(variant.name)


def measure_memory(recorder: Recorder, array_bytes: int) -> None:
    """Measure all usable cores reading, then copying, each its own part of an array. A copied byte counts twice."""
    threads = usable_cores()
    source, target = (np.ones(array_bytes // 8, np.int64) for _ in range(2))  # written, so that their pages exist
    froms, tos = np.array_split(source, threads), np.array_split(target, threads)
    with ThreadPoolExecutor(threads) as pool:
        for metric, passes, work in (
            # "or" is the reduction that costs the core least; numpy lets other threads run meanwhile.
            ("memory read", 1, lambda: list(pool.map(np.bitwise_or.reduce, froms))),
            ("memory copied", 2, lambda: list(pool.map(np.copyto, tos, froms))),
        ):
            work()
            recorder.record(
                SUITE, "memory", metric,
                *(passes * source.nbytes / seconds / 1e9 for seconds in seconds_of(work, MEMORY_REPETITIONS)),
                unit="GB/s",
                conditions={
                    "threads": threads,
                    "array MiB": source.nbytes / 2**20,
                    "last cache MiB": last_cache_bytes() / 2**20,
                },
            )  # fmt: skip


def last_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache of the first core; 0 where the system does not state it."""
    sizes = [file.read_text(encoding="ascii").strip() for file in folder.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=0)


def measure_ceiling(
    recorder: Recorder, engine: EngineName, precision: Precision, shape: EncoderShape, repetitions: int
) -> None:
    """Measure the library's best rate over the encoder's own matrix shapes, on all usable cores.

    There are as many rows as a full batch of the runtime has tokens. The ceiling is the fastest sample, for it must
    not sink because other work was running. In int8, too, a multiplication and an addition count as two operations.

    Raises:
        EngineError: there is no ceiling for this engine and precision.
    """
    threads, best_outer = usable_cores(), 0
    best: tuple[float, ...] = (0.0,)
    for outer in sorted({shape.hidden, 3 * shape.hidden, shape.intermediate}):
        sizes = Sizes(TOKEN_BUDGET, shape.hidden, outer)
        run, flop = repeated(engine, precision, sizes, streams=threads, turns=2)
        run()
        samples = tuple(flop / seconds / 1e9 for seconds in seconds_of(run, repetitions))
        if max(samples) > max(best):
            best, best_outer = samples, outer
    recorder.record(
        SUITE, f"{engine.value} {precision.value}", METRIC, *best, unit="GFLOP/s",
        conditions={
            "threads": threads,
            "best shape": f"[{TOKEN_BUDGET}, {shape.hidden}] x [{shape.hidden}, {best_outer}]",
            "MFLOP per token": shape.flop_per_token / 1e6,
        },
    )  # fmt: skip


def ceiling_of(variant: Variant, measurements: Sequence[Measurement]) -> float | None:
    """Return a variant's ceiling in GFLOP/s; None where none was measured."""
    found = [one for one in measurements if (one.suite, one.party, one.metric) == (SUITE, variant.name, METRIC)]
    return found[0].figure("max") if found else None


def floor_of(variant: Variant, tokens: int, plan: Plan, measurements: Sequence[Measurement]) -> float | None:
    """Return the milliseconds below which a text cannot be encoded here; None where too little is known.

    It is the longer of two: the text's matrix products at the ceiling's rate, and reading the weights of these
    matrices from memory, as far as they exceed what the last cache keeps from one text to the next.
    """
    ceiling = ceiling_of(variant, measurements)
    memory = [one for one in measurements if (one.suite, one.metric) == (SUITE, "memory read")]
    if plan.shape is None or ceiling is None or not memory:
        return None
    flop = plan.shape.flop_per_token
    weights = flop // 2 * WEIGHT_BYTES[variant.precision]  # a token multiplies and adds once for each weight
    cached = float(memory[0].conditions["last cache MiB"]) * 2**20
    memory_s = max(0.0, weights - cached) / (memory[0].figure("max") * 1e9)
    return 1e3 * max(tokens * flop / (ceiling * 1e9), memory_s)


def reference_work(plan: Plan, variant: Variant, recorder: Recorder, tokens: int | None = None) -> Reference | None:
    """Return the reference work for full batches on all streams at once, or for one text of `tokens` on all cores.

    None where the variant has no ceiling, for which the report has the reason, or no such products can be compiled,
    which becomes a failure.
    """
    if plan.shape is None or ceiling_of(variant, recorder.measurements) is None:
        return None
    if tokens is None:
        suite, rows, streams, runs = Suite.THROUGHPUT, TOKEN_BUDGET, usable_cores(), BATCH_RUNS
    else:
        suite, rows, streams, runs = Suite.LATENCY, tokens, 1, SINGLE_RUNS
    sizes = Sizes(rows, plan.shape.hidden, plan.shape.intermediate)
    try:
        run, _ = repeated(variant.engine, variant.precision, sizes, streams=streams, turns=1)
    except EngineError as error:
        recorder.fail(suite.value, f"{variant.name}, reference of {rows} rows", error)
        return None
    run()  # warm-up
    return lambda: median(seconds_of(run, runs))
