"""NVIDIA's perf_analyzer: found in its own environment, run on the same server, its table read."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.serving_results import PerfAnalyzerRun
from mirror_runtime.environments import make_environment
from mirror_runtime.errors import PeerError

NAME = "perf_analyzer"
REQUIREMENTS = Path(__file__).resolve().parent / "peers" / f"{NAME}.txt"
TIMEOUT_S = 120.0

_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


def find_perf_analyzer(given: Path | None, environments: Path, say: Callable[[str], None]) -> Path:
    """Give the binary, from an environment that the caller made or from one that is made now, once.

    Raises:
        PeerError: the environment cannot be made, or holds no such binary.
    """
    folder = environments.absolute() / NAME if given is None else given.absolute()
    if given is None:
        make_environment(REQUIREMENTS, folder, say)
    program = folder / "bin" / NAME
    if not program.is_file():
        raise PeerError(f"{folder} holds no {NAME}: the wheel in {REQUIREMENTS.name} has it on Linux x86-64 alone")
    return program


def run_perf_analyzer(
    program: Path,
    *,
    model: str,
    grpc_port: int,
    texts: Sequence[str],
    concurrency: int,
    texts_a_request: int,
    seconds: float,
    scratch: Path,
) -> PerfAnalyzerRun:
    """Let it measure one closed loop over gRPC.

    Its figures must not wander by more than 20 % over three windows; where they do for ten, it gives what it has.

    Args:
        program: the binary.
        model: the served model's name.
        grpc_port: on this machine.
        texts: sent in turn.
        concurrency: callers.
        texts_a_request: in each.
        seconds: of one window.
        scratch: for its files.

    Raises:
        PeerError: it ended without figures; the message holds the last line it wrote.
    """
    data, table = scratch / "texts.json", scratch / "table.csv"
    data.write_text(json.dumps({"data": [{"TEXT": [text]} for text in texts]}), encoding="utf-8")
    table.unlink(missing_ok=True)
    command = [
        *(str(program), "-m", model, "-u", f"127.0.0.1:{grpc_port}", "-i", "grpc"),
        *("--input-data", str(data), "--shape", "TEXT:1", "-b", str(texts_a_request)),
        *("--concurrency-range", f"{concurrency}:{concurrency}", "--stability-percentage", "20"),
        *("--measurement-interval", str(round(1000 * seconds)), "-f", str(table)),
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
    if len(rows) != 1:
        raise PeerError(f"perf_analyzer gave {len(rows)} rows of figures where one is expected")
    return PerfAnalyzerRun(
        concurrency=concurrency,
        texts_a_request=texts_a_request,
        texts_per_s=_number(rows[0], "Inferences/Second"),
        p50_ms=_number(rows[0], "p50 latency") / 1e3,
        p99_ms=_number(rows[0], "p99 latency") / 1e3,
    )


def _libraries(folder: Path) -> Path:
    """Lay out the libraries that the binary wants and few systems have: the server's wheel brings them, renamed."""
    folder.mkdir(exist_ok=True)
    wheel = find_spec("pytriton")
    for place in (wheel.submodule_search_locations or []) if wheel is not None else []:
        brought = Path(place).parent / "nvidia_pytriton.libs"
        for name, pattern in _LIBRARIES.items():
            for library in sorted(brought.glob(pattern))[:1]:
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(library)
    return folder


def _number(row: Mapping[str, str], column: str) -> float:
    try:
        return float(row[column])
    except (KeyError, ValueError) as error:
        raise PeerError(f"perf_analyzer's table has no number in the column {column!r}") from error
