"""How fast the machine is just now: bare matrix products, timed in turn with what is measured.

A machine that others use too is a fifth slower for some seconds, and with it whatever runs in them. A yardstick is
slower then as well: `benchmarks.compare` divides by it. It multiplies matrices of the encoder's sizes in the engine's
own library, with as many rows and streams as what stands beside it has, and no code of the runtime is part of it. What
slows both it does not show, such as another release of the library: absolute times stand beside every ratio.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.ceilings import EncoderShape
from benchmarks.point import Point
from benchmarks.products import Matrices, repeated
from benchmarks.session import Results
from benchmarks.stopwatch import seconds_of
from benchmarks.summary import median
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import TOKEN_BUDGET

BATCHES, SINGLES = 3, 15
"""Runs whose median counts: a twentieth of a second and less, beside a round of a quick run."""

Yardstick = Callable[[], float]
"""Measures the seconds that the products take now."""


def beside_batches(point: Point, shape: EncoderShape | None, results: Results) -> Yardstick | None:
    """Give a yardstick for full batches on all streams at once.

    Returns:
        None where the point has no ceiling, for which the report has the reason, or no such products can be compiled,
        which becomes a failure.
    """
    return _yardstick("throughput", point, shape, results, rows=TOKEN_BUDGET, streams=usable_cores(), runs=BATCHES)


def beside_one_text(point: Point, shape: EncoderShape | None, tokens: int, results: Results) -> Yardstick | None:
    """Give a yardstick for one text of so many tokens, all cores on it; None as for `beside_batches`."""
    return _yardstick("latency", point, shape, results, rows=tokens, streams=1, runs=SINGLES)


def _yardstick(
    suite: str, point: Point, shape: EncoderShape | None, results: Results, *, rows: int, streams: int, runs: int
) -> Yardstick | None:
    if shape is None or (point.engine, point.precision) not in results.ceilings:
        return None
    matrices = Matrices.draw(rows, shape.hidden, shape.intermediate)
    try:
        run, _ = repeated(point.engine, point.precision, matrices, streams=streams, turns=1)
    except EngineError as error:
        results.fail(suite, f"{point.name}, yardstick of {rows} rows", error)
        return None

    def seconds() -> float:
        return median(seconds_of(run, runs))

    seconds()  # warms it up
    return seconds
