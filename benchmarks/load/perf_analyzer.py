"""NVIDIA's perf_analyzer: find it in its own environment, run it on the same server, and read its table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.load.servers import Row
from benchmarks.peers.environments import find_environment
from benchmarks.peers.specs import FOLDER
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import PeerError

NAME = "perf_analyzer"
TIMEOUT_S = 120.0

_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


def find_perf_analyzer(given: Mapping[str, Path], folder: Path, on_progress: Callable[[str], None]) -> Path:
    """Return the binary of its environment; see `find_environment`.

    Raises:
        PeerError: the environment cannot be made, or does not have the binary.
    """
    program = find_environment(NAME, FOLDER, given, folder, on_progress).parent / NAME
    if not program.is_file():
        raise PeerError(f"{program} does not exist: the wheel in {NAME}.txt has it on Linux x86-64 only")
    return program


def run_perf_analyzer(
    program: Path, grpc_port: int, texts: Sequence[str], *, callers: int, size: int, window_s: float, scratch: Path
) -> list[Row]:
    """Measure one closed loop over gRPC until the figures of three windows are within 20 %, or for ten windows.

    Raises:
        PeerError: it ended without figures; the message has the last line it wrote.
    """
    data, table = scratch / "texts.json", scratch / "table.csv"
    data.write_text(json.dumps({"data": [{"TEXT": [text]} for text in texts]}), encoding="utf-8")
    table.unlink(missing_ok=True)
    command = [
        *(str(program), "-m", MODEL_NAME, "-u", f"127.0.0.1:{grpc_port}", "-i", "grpc"),
        *("--input-data", str(data), "--shape", "TEXT:1", "-b", str(size)),
        *("--concurrency-range", f"{callers}:{callers}", "--stability-percentage", "20"),
        *("--measurement-interval", str(round(1000 * window_s)), "-f", str(table)),
    ]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(_libraries(scratch / "libraries"))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"perf_analyzer cannot be run: {error}") from error
    if not table.is_file():
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise PeerError(f"perf_analyzer ended with status {done.returncode}: {' '.join(last)}")
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    try:
        (row,) = rows
        rate, p50_us, p99_us = (float(row[name]) for name in ("Inferences/Second", "p50 latency", "p99 latency"))
    except (KeyError, ValueError) as error:
        raise PeerError(f"perf_analyzer's table is not one row with a rate, p50 and p99 ({error}): {rows}") from error
    milliseconds = (("p50 of requests", p50_us / 1e3), ("p99 of requests", p99_us / 1e3))
    return [("texts per second", "1/s", [rate]), *((metric, "ms", [ms]) for metric, ms in milliseconds)]


def _libraries(folder: Path) -> Path:
    """Link the libraries that the binary needs and few systems have: the server's wheel brings them, renamed."""
    folder.mkdir(exist_ok=True)
    wheel = find_spec("pytriton")
    for location in (wheel.submodule_search_locations or []) if wheel is not None else []:
        wheel_libraries = Path(location).parent / "nvidia_pytriton.libs"
        for name, pattern in _LIBRARIES.items():
            for library in sorted(wheel_libraries.glob(pattern))[:1]:
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(library)
    return folder
