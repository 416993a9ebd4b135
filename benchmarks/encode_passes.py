"""Encode texts some times over and end: a program that another one can time from outside, see `benchmarks.agree`.

python benchmarks/encode_passes.py BUNDLE ENGINE PRECISION TEXTS.json PASSES batch
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mirror_runtime import Encoder

BATCH, SINGLE = "batch", "single"
"""All texts of a pass in one call, or each in a call of its own."""


def main(bundle: str, engine: str, precision: str, texts: str, passes: str, way: str) -> None:
    """Load, encode, end; nothing is timed here."""
    workload = json.loads(Path(texts).read_text(encoding="utf-8"))
    calls = [workload] if way == BATCH else [[text] for text in workload]
    with Encoder.load(bundle, engine=engine, precision=precision) as encoder:
        for _ in range(int(passes)):
            for call in calls:
                encoder.encode(call)


if __name__ == "__main__":
    main(*sys.argv[1:])
