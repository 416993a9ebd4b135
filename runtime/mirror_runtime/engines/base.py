"""The interface between packed rows and the libraries that execute graphs."""

from __future__ import annotations

from typing import Protocol

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.packing import PackedRows
from mirror_runtime.vectors import Vectors


class Engine(Protocol):
    """Runs packed rows through one graph. It knows token ids only, not texts or policies.

    Attributes:
        name: the library.
        precision: the precision it runs in: always the requested one.
        streams: concurrent calls of `run` that it serves; the caller keeps that many in flight.
        length_multiple: row lengths of more than 32 tokens must be multiples of it.
        dynamic_shapes: whether a further shape is cheap. It is not where shapes are built ahead of time, or where each
            one holds the weights once more on a GPU.
    """

    name: EngineName
    precision: Precision
    streams: int
    length_multiple: int
    dynamic_shapes: bool

    def run(self, rows: PackedRows) -> Vectors:
        """Compute the pooled vectors of one batch. Safe to call from several threads.

        Args:
            rows: arrays [R, L].

        Returns:
            [R, L // 4, width] of the encoder's vector type, see `mirror_runtime.vectors`; zeros in empty slots. The
            caller owns the array.

        Raises:
            EngineError: the library failed.
        """

    def close(self) -> None:
        """Release the library's resources. The engine cannot run afterwards."""
