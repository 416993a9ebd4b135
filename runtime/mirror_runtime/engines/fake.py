"""An engine without weights: vectors are a fixed function of a text's own token ids. For tests of everything else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import TOKENS_PER_SLOT, EngineName, Precision
from mirror_runtime.packing import PackedRows


class FakeEngine:
    """Hashes each segment's ids and positions to a unit vector: wrong packing or order gives a different vector."""

    def __init__(self, precision: Precision, streams: int | None, dim: int) -> None:
        self.name = EngineName.FAKE
        self.precision = precision
        self.streams = streams or 1
        self._dim = dim

    def run(self, rows: PackedRows) -> NDArray[np.float32]:
        """Compute float32 [R, L // 4, dim]; see `Engine.run`."""
        count, length = rows.shape
        out = np.zeros((count, length // TOKENS_PER_SLOT, self._dim), np.float32)
        phase = np.arange(1, self._dim + 1, dtype=np.float64)
        for row in range(count):
            for segment in range(1, int(rows.segment_ids[row].max()) + 1):
                mine = rows.segment_ids[row] == segment
                key = ((rows.input_ids[row][mine] + 1) * (rows.position_ids[row][mine] + 1)).sum()
                vector = np.sin(phase * (1.0 + float(key % 9973)))
                out[row, segment - 1] = vector / np.linalg.norm(vector)
        return out

    def close(self) -> None:
        """Nothing to release."""
