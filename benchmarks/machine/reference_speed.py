"""How fast the machine is at this moment: bare matrix products, timed in turn with what is measured.

A machine that others use too may be a fifth slower for some seconds, and with it whatever runs then. The reference
work slows down with it, and `benchmarks.compare` divides by it. It multiplies matrices of the encoder's sizes in the
engine's own library, with as many rows and streams as the measured work, and runs no code of the runtime. What slows
both is hidden, such as another release of the library: absolute times stand beside every ratio.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.machine.ceilings import ceiling_of
from benchmarks.machine.products import Matrices, repeated, seconds_of
from benchmarks.plan import Plan, Suite, Variant
from benchmarks.recorder import Recorder
from benchmarks.report.statistics import median
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import TOKEN_BUDGET

BATCH_RUNS, SINGLE_RUNS = 3, 15
"""Runs whose median counts: a twentieth of a second or less, beside a round of a quick run."""

Reference = Callable[[], float]
"""Measures the seconds that the products take now."""


def beside_batches(plan: Plan, variant: Variant, recorder: Recorder) -> Reference | None:
    """Return the reference work for full batches on all streams at once.

    Returns:
        None where the variant has no ceiling, for which the report has the reason, or no such products can be
        compiled, which becomes a failure.
    """
    streams = usable_cores()
    return _reference(plan, Suite.THROUGHPUT, variant, recorder, rows=TOKEN_BUDGET, streams=streams, runs=BATCH_RUNS)


def beside_one_text(plan: Plan, variant: Variant, tokens: int, recorder: Recorder) -> Reference | None:
    """Return the reference work for one text of so many tokens on all cores; None as for `beside_batches`."""
    return _reference(plan, Suite.LATENCY, variant, recorder, rows=tokens, streams=1, runs=SINGLE_RUNS)


def _reference(
    plan: Plan, suite: Suite, variant: Variant, recorder: Recorder, *, rows: int, streams: int, runs: int
) -> Reference | None:
    if plan.shape is None or ceiling_of(variant, recorder.measurements) is None:
        return None
    matrices = Matrices.draw(rows, plan.shape.hidden, plan.shape.intermediate)
    try:
        run, _ = repeated(variant.engine, variant.precision, matrices, streams=streams, turns=1)
    except EngineError as error:
        recorder.fail(suite.value, f"{variant.name}, reference of {rows} rows", error)
        return None

    def seconds() -> float:
        return median(seconds_of(run, runs))

    seconds()  # warm-up
    return seconds
