"""Run the benchmark with a planted regression: `self_check.py` checks that `compare.py` catches it.

    python benchmarks/planted.py 0.15 BUNDLE …

takes the arguments of `run.py` after the slowdown: each engine run takes longer by this share of its time, asleep.
Neither the runtime nor `run.py` knows about it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import run
from mirror_runtime import Encoder
from mirror_runtime.engines import Engine
from mirror_runtime.packing import PackedRows
from mirror_runtime.vectors import Vectors


def slow_down(engine: Engine, share: float) -> None:
    """Make every run of an engine sleep for a share of its own time: 0.15 turns 10 ms into 11.5 ms."""
    unchanged = engine.run

    def run_slowly(rows: PackedRows) -> Vectors:
        began = time.perf_counter()
        vectors = unchanged(rows)
        time.sleep(share * (time.perf_counter() - began))
        return vectors

    setattr(engine, "run", run_slowly)  # noqa: B010 - mypy rejects an assignment to a method


def main(argv: Sequence[str] | None = None) -> int:
    """Plant the slowdown in every encoder that this process loads, and run the benchmark.

    Returns:
        What `run.py` returns.
    """
    share, *arguments = sys.argv[1:] if argv is None else argv
    load = Encoder.load

    def load_slowed(*values: Any, **options: Any) -> Encoder:
        encoder = load(*values, **options)
        slow_down(encoder.engine, float(share))
        return encoder

    with patch.object(Encoder, "load", load_slowed):
        return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
