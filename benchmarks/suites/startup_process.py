"""The process that suite `startup` times: it answers `load`, then `encode`, as the peers' workers do.

Imports nothing of the benchmarks: their imports would count.
"""

from __future__ import annotations

import json
import sys

if __package__ in (None, ""):  # run by path: the modules of this folder must not stand for others
    sys.path.pop(0)

from mirror_runtime import Encoder


def main() -> None:
    """Load a bundle and encode a first text; after the next request encode the texts of the first one."""
    request = json.loads(sys.stdin.readline())
    engine, precision = request["backend"].split()
    encoder = Encoder.load(request["model"], engine=engine, precision=precision)
    for texts in (request["texts"][:1], request["texts"]):
        encoder.encode(texts)
        sys.stdout.write("{}\n")
        sys.stdout.flush()
        sys.stdin.readline()  # the next request, or the end: until then this process's memory can be read


if __name__ == "__main__":
    main()
