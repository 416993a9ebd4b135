"""The process that suite `startup` times: load a bundle, encode one text, then a file's texts.

python benchmarks/suites/startup_process.py BUNDLE ENGINE PRECISION TEXTS.json

Imports nothing of the benchmarks: their imports would count.
"""

from __future__ import annotations

import json
import sys

if __package__ in (None, ""):  # run by path: the modules of this folder must not stand for others
    sys.path.pop(0)

from mirror_runtime import Encoder


def report(word: str) -> None:
    """Print a word and the process's peak resident memory in bytes, that of the process that started it left out."""
    with open("/proc/self/status", encoding="ascii") as status:
        peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    sys.stdout.write(f"{word} {peak}\n")
    sys.stdout.flush()


def main(bundle: str, engine: str, precision: str, texts: str) -> None:
    """Print "ready" with the first vector in hand, and "done" with those of all texts."""
    encoder = Encoder.load(bundle, engine=engine, precision=precision)
    if encoder.encode(["How long does the first vector take?"]).shape[0] != 1:
        sys.exit("the first text has no vector")
    report("ready")
    with open(texts, encoding="utf-8") as file:
        encoder.encode(json.load(file))
    report("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
