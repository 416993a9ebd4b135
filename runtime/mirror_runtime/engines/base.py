"""The interface between packed rows and the libraries that execute graphs."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Protocol

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError
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
            [R, L // 4, width] of the encoder's vector type, see `mirror_runtime.vectors`; zeros in empty slots. With
            pooling `tokens` [R, L, width], one for each place. The caller owns the array.

        Raises:
            EngineError: the library failed.
        """

    def close(self) -> None:
        """Release the library's resources. The engine cannot run afterwards."""


_loaded: weakref.WeakSet[Engine] = weakref.WeakSet()


def _keep() -> None:
    """Keep a forked child from destroying its parent's engines when it ends: that would wait for threads, too."""
    for engine in list(_loaded):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


os.register_at_fork(after_in_child=_keep)


class Lifetime:
    """Where and until when an engine can be used: in the process that loaded it, until it is closed.

    A forked child has a copy of the engine without its threads, and a call there would wait for them for ever.
    """

    def __init__(self, engine: Engine) -> None:
        self._process, self._closed = os.getpid(), False
        _loaded.add(engine)

    def check(self) -> None:
        """Raise an `EngineError` where the engine cannot be used."""
        self.check_process()
        if self._closed:
            raise EngineError("this encoder is closed: load it again")

    def check_process(self) -> None:
        """Raise an `EngineError` in a forked child."""
        if os.getpid() != self._process:
            raise EngineError(
                "this encoder was loaded before the process forked, which leaves the engine's threads behind: load it "
                "in the child, or start processes with spawn"
            )

    @contextmanager
    def until_closed(self) -> Iterator[None]:
        """Raise an `EngineError` where another thread's closing interrupts the block."""
        try:
            yield
        except (RuntimeError, CancelledError):  # the pool takes no more work, or has dropped some
            self.check()
            raise

    def end(self) -> bool:
        """Note the end; return whether there is something to release, for the first time and in the right process."""
        first = not self._closed and os.getpid() == self._process
        self._closed = True
        return first
