"""Work in a process beside this one: two traces of one encoder take both of two cores, which Python's lock forbids."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from mirror_runtime.errors import EngineError

FORKS = sys.platform == "linux"
"""Elsewhere processes do not fork, or system libraries break when they do: the work is then done after the block."""


@contextmanager
def beside(work: Callable[[], None], what: str) -> Iterator[None]:
    """Do some work, whose result lies in files, beside the block; it is done when the block ends.

    The child is forked, so that it has the model already: a new interpreter would import PyTorch for five seconds and
    read the weights again.

    Args:
        work: what to do. It must not use PyTorch on more than one thread.
        what: names it in messages.

    Raises:
        EngineError: from the work; or its process died.
        OSError: from the work.
    """
    if not FORKS:
        yield
        work()
        return
    forking = multiprocessing.get_context("fork")
    receiving, sending = forking.Pipe(duplex=False)
    child = forking.Process(target=_child, args=(work, sending), name=what, daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns of locks that other threads may hold. The child takes none of theirs, see `work`.
        warnings.filterwarnings("ignore", r".*multi-threaded, use of fork", DeprecationWarning)
        child.start()
    sending.close()
    try:
        yield
        try:
            error = receiving.recv()
        except EOFError:
            child.join()
            died = f"died with exit status {child.exitcode}"
            raise EngineError(f"the process that does the {what} {died}: it may have been out of memory") from None
        child.join()
        if error is not None:
            raise error
    finally:
        child.terminate()  # nothing is left to end but after an error in the block
        child.join()
        receiving.close()


def _child(work: Callable[[], None], sending: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the parent ends this one
    torch.set_num_threads(1)  # the pool's other threads are not in a fork
    # Nor is the thread that draws progress: had it held the terminal's lock, a warning would wait for it for ever.
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
    error = None
    try:
        work()
    except (EngineError, OSError) as raised:
        error = raised
    sending.send(error)
