"""A regression planted on purpose, to see that the benchmark catches it. The runtime knows nothing of this."""

from __future__ import annotations

import time

from mirror_runtime.engines import Engine
from mirror_runtime.packing import PackedRows
from mirror_runtime.vectors import Vectors


class Slowed:
    """An engine each of whose runs takes longer by a share of its own time, asleep.

    Args:
        engine: what computes.
        share: 0.15 lets a run of 10 ms take 11.5 ms.
    """

    def __init__(self, engine: Engine, share: float) -> None:
        self.name = engine.name
        self.precision = engine.precision
        self.streams = engine.streams
        self.length_multiple = engine.length_multiple
        self.dynamic_shapes = engine.dynamic_shapes
        self._engine = engine
        self._share = share

    def run(self, rows: PackedRows) -> Vectors:
        """Run one batch, then sleep."""
        began = time.perf_counter()
        vectors = self._engine.run(rows)
        time.sleep(self._share * (time.perf_counter() - began))
        return vectors

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()
