"""The ceiling before the figures: how fast the engine's own library multiplies bare matrices on this machine.

A throughput is then shown as a share of what the hardware and library could give at best. The operations counted are
those of the encoder's matrix products on useful tokens; attention, embeddings and all elementwise work are left out,
so that a share of 1 is out of reach.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from benchmarks.bandwidth import measure_bandwidth
from benchmarks.machine_results import Ceiling
from benchmarks.products import Matrices, repeated
from benchmarks.session import Plan, Results, steps
from benchmarks.stopwatch import seconds_of
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import BundleError, MirrorError
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import TOKEN_BUDGET

REPETITIONS = 8
QUICK_REPETITIONS = 1


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The sizes that decide the cost of a token: layers, hidden width, width of the feed-forward layer."""

    layers: int
    hidden: int
    intermediate: int

    @property
    def flop_per_token(self) -> int:
        """Operations of one token: 2 for each weight of the four attention and two feed-forward matrices."""
        return 2 * self.layers * (4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate)


def read_shape(bundle: Path) -> EncoderShape:
    """Read the encoder's sizes from the bundle's config.json (BERT's key names).

    Raises:
        BundleError: the file is missing or lacks a key.
    """
    path = bundle / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return EncoderShape(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
        )
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path} does not give the encoder's sizes: {error} is missing") from error


def measure_ceilings(plan: Plan, shape: EncoderShape, results: Results, progress: Progress) -> None:
    """Measure the memory's rate, then one ceiling for each engine and precision; what cannot be is a failure."""
    if results.has("ceilings"):
        return
    repetitions = QUICK_REPETITIONS if plan.quick else REPETITIONS
    with steps(progress, "ceilings", 1 + len(plan.points)) as done:
        results.bandwidth = measure_bandwidth()
        done("memory")
        for point in plan.points:
            try:
                ceiling = measure_ceiling(point.engine, point.precision, shape, repetitions)
                results.ceilings[point.engine, point.precision] = ceiling
            except MirrorError as error:
                results.fail("ceilings", point.name, error)
            done(point.name)
    results.finish("ceilings")


def measure_ceiling(
    engine: EngineName, precision: Precision, shape: EncoderShape, repetitions: int = REPETITIONS
) -> Ceiling:
    """Measure the library's best rate over the encoder's own matrix shapes, on all usable cores.

    The rows are as many as a full batch of the runtime has tokens.

    Raises:
        EngineError: there is no ceiling for this engine and precision.
    """
    outers = sorted({shape.hidden, 3 * shape.hidden, shape.intermediate})
    candidates = [_measure(engine, precision, shape.hidden, outer, repetitions) for outer in outers]
    return max(candidates, key=lambda ceiling: ceiling.gflop_per_s)


def _measure(engine: EngineName, precision: Precision, inner: int, outer: int, repetitions: int) -> Ceiling:
    threads = usable_cores()
    matrices = Matrices.draw(TOKEN_BUDGET, inner, outer)
    run, calls = repeated(engine, precision, matrices, streams=threads, turns=2)
    run()
    samples = seconds_of(run, repetitions)
    flop = calls * matrices.flop
    return Ceiling(
        engine=engine,
        precision=precision,
        threads=threads,
        rows=TOKEN_BUDGET,
        inner=inner,
        outer=outer,
        flop_per_sample=flop,
        samples_s=samples,
        gflop_per_s=flop / min(samples) / 1e9,
    )
