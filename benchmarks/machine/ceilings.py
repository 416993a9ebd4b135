"""The ceiling before the figures: how fast the engine's own library multiplies bare matrices on this machine.

A throughput is then shown as a share of what hardware and library could do at best. The operations counted are those
of the encoder's matrix products on useful tokens; attention, embeddings and all elementwise work are left out, so that
a share of 1 is out of reach.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress import Progress

from benchmarks.machine.bandwidth import floor_ms, measure_bandwidth
from benchmarks.machine.products import Matrices, repeated, seconds_of
from benchmarks.plan import EncoderShape, Plan, Variant, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better, Measurement
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import TOKEN_BUDGET

SUITE = "ceilings"
METRIC = "matrix products"
REPETITIONS = 8
QUICK_REPETITIONS = 1


def measure_ceilings(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Measure memory bandwidth, then one ceiling for each variant; one that cannot be measured is a failure."""
    if plan.shape is None:
        recorder.fail(SUITE, "all", "the bundle's config.json does not state the encoder's sizes")
        return
    repetitions = QUICK_REPETITIONS if plan.quick else REPETITIONS
    with steps(progress, SUITE, 1 + len(plan.variants)) as done:
        for measurement in measure_bandwidth():
            recorder.add(measurement)
        done("memory")
        for variant in plan.variants:
            with recorder.failing(SUITE, variant.name):
                recorder.add(measure_ceiling(variant.engine, variant.precision, plan.shape, repetitions))
            done(variant.name)


def measure_ceiling(
    engine: EngineName, precision: Precision, shape: EncoderShape, repetitions: int = REPETITIONS
) -> Measurement:
    """Measure the library's best rate over the encoder's own matrix shapes, on all usable cores.

    There are as many rows as a full batch of the runtime has tokens. The ceiling is the fastest sample, for it must
    not sink because other work was running. In int8, too, a multiplication and an addition count as two operations.

    Raises:
        EngineError: there is no ceiling for this engine and precision.
    """
    outers = sorted({shape.hidden, 3 * shape.hidden, shape.intermediate})
    candidates = [_measure(engine, precision, shape, outer, repetitions) for outer in outers]
    return max(candidates, key=lambda candidate: candidate.figure("max"))


def ceiling_of(variant: Variant, measurements: Sequence[Measurement]) -> float | None:
    """Return a variant's ceiling in GFLOP/s; None where none was measured."""
    found = [one for one in measurements if (one.suite, one.party, one.metric) == (SUITE, variant.name, METRIC)]
    return found[0].figure("max") if found else None


def floor_of(variant: Variant, tokens: int, plan: Plan, measurements: Sequence[Measurement]) -> float | None:
    """Return the milliseconds below which one text cannot be encoded here; None where too little is known."""
    ceiling = ceiling_of(variant, measurements)
    memory = [one for one in measurements if (one.suite, one.metric) == (SUITE, "memory read")]
    if plan.shape is None or ceiling is None or not memory:
        return None
    flop = plan.shape.flop_per_token
    return floor_ms(tokens, variant.precision, flop_per_token=flop, gflop_per_s=ceiling, memory=memory[0])


def _measure(
    engine: EngineName, precision: Precision, shape: EncoderShape, outer: int, repetitions: int
) -> Measurement:
    threads = usable_cores()
    matrices = Matrices.draw(TOKEN_BUDGET, shape.hidden, outer)
    run, calls = repeated(engine, precision, matrices, streams=threads, turns=2)
    run()
    return Measurement(
        suite=SUITE,
        party=f"{engine.value} {precision.value}",
        conditions={
            "threads": threads,
            "best shape": f"[{TOKEN_BUDGET}, {shape.hidden}] x [{shape.hidden}, {outer}]",
            "MFLOP per token": shape.flop_per_token / 1e6,
        },
        metric=METRIC,
        unit="GFLOP/s",
        samples=tuple(calls * matrices.flop / seconds / 1e9 for seconds in seconds_of(run, repetitions)),
        better=Better.NEITHER,
    )
