"""An engine without weights, for tests: vectors are a fixed function of a text's token ids."""

from __future__ import annotations

import numpy as np

from mirror_runtime.bundle import TOKENS_PER_SLOT, EncoderSpec, EngineName, Precision
from mirror_runtime.packing import BLOCK, PackedRows
from mirror_runtime.vectors import Vectors, round_vectors, unit_rows


class FakeEngine:
    """Hashes a segment's ids, positions and types to a unit vector or a score: wrong packing or order changes it."""

    def __init__(self, precision: Precision, streams: int | None, spec: EncoderSpec) -> None:
        self.name = EngineName.FAKE
        self.precision = precision
        self.streams = streams or 1
        self.length_multiple = BLOCK
        self.dynamic_shapes = True
        self._spec = spec

    def run(self, rows: PackedRows) -> Vectors:
        """Compute [R, L // 4, width], or [R, L, width] with pooling `tokens`; see `Engine.run`."""
        count, length = rows.shape
        slots = length if self._spec.per_token else length // TOKENS_PER_SLOT
        out = np.zeros((count, slots, self._spec.dim), np.float32)
        phase = np.arange(1, self._spec.dim + 1, dtype=np.float64)
        for row in range(count):
            for segment in range(1, int(rows.segment_ids[row].max()) + 1):
                mine = rows.segment_ids[row] == segment
                tokens = (rows.input_ids[row][mine] + 1) * (rows.position_ids[row][mine] + 1)
                if self._spec.per_token:  # each depends on itself and on its text
                    keys = 1.0 + (tokens + tokens.sum()) % 9973
                    out[row, mine] = unit_rows(np.sin(phase * keys[:, None]))
                    continue
                key = (tokens if rows.token_type_ids is None else tokens << rows.token_type_ids[row][mine]).sum()
                vector = np.sin(phase * (1.0 + float(key % 9973)))
                out[row, segment - 1] = vector if self._spec.scores_pairs else vector / np.linalg.norm(vector)
        return round_vectors(out, self._spec)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
