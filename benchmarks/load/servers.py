"""The servers that are put under load: Triton with its own statistics, and `mirror gateway` as its users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.plan import Variant
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import ServerError
from mirror_runtime.gateway.settings import KEY_VARIABLE
from mirror_runtime.triton.server.server import Server, launcher

T = TypeVar("T")

STARTUP_S = 180.0
STOP_S = 10.0

SETTLE_S = 0.1
"""Triton counts a request a moment after it has answered it."""

_HOST = "127.0.0.1"
_POLL_S = 0.05
_LOG_LINES = 5
_ADDRESS = re.compile(rf"^TEI\s+http://({re.escape(_HOST)}:\d+)/embed$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ServerTimes:
    """Triton's own statistics of the requests of one loop.

    Attributes:
        queue_ms: mean time that a request waited for others to share an execution with, or for a free instance.
        compute_ms: mean time in the model: tokenising, packing and running the graph.
        texts_per_execution: mean number of texts that shared an execution.
    """

    queue_ms: float
    compute_ms: float
    texts_per_execution: float


class TritonStatistics:
    """Triton's counters since the last call."""

    def __init__(self, server: Server) -> None:
        self._url = f"http://{_HOST}:{server.http_port}/v2/models/{MODEL_NAME}/stats"
        self._before = self._counters()

    def take(self) -> ServerTimes | None:
        """Return the statistics of the requests since the last call; None if no request was answered.

        Raises:
            ServerError: the counters cannot be read.
        """
        now = self._counters()
        gained = {name: value - self._before[name] for name, value in now.items()}
        self._before = now
        if not gained["requests"] or not gained["executions"]:
            return None
        return ServerTimes(
            queue_ms=gained["queue_ns"] / gained["requests"] / 1e6,
            compute_ms=gained["compute_ns"] / gained["requests"] / 1e6,
            texts_per_execution=gained["texts"] / gained["executions"],
        )

    def _counters(self) -> Mapping[str, int]:
        time.sleep(SETTLE_S)
        stats = _read_json(self._url)["model_stats"][0]
        times = stats["inference_stats"]
        return {
            "texts": stats["inference_count"],
            "executions": stats["execution_count"],
            "requests": times["success"]["count"],
            "queue_ns": times["queue"]["ns"],
            "compute_ns": sum(times[part]["ns"] for part in ("compute_input", "compute_infer", "compute_output")),
        }


@contextmanager
def mirror_process(
    folder: Path, *arguments: str, ready: Callable[[str], T | None]
) -> Iterator[tuple[subprocess.Popen[bytes], T]]:
    """Run a `mirror` command that serves, and stop it on exit. Its output goes to the files `output` and `log`.

    Call it in the main thread: the process is ended when the thread that started it ends.

    Args:
        folder: existing, for its output and, in `tmp`, its temporary files.
        arguments: of `mirror`.
        ready: receives what it has printed so far; returns None until it serves.

    Yields:
        The process, and the result of `ready`.

    Raises:
        ServerError: it ended or was not ready in time; the message has the end of its log.
    """
    temporary, output, log = folder / "tmp", folder / "output", folder / "log"
    temporary.mkdir()
    # Our callers have no API key.
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    with output.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            [*launcher(), sys.executable, "-m", "mirror_runtime.cli", *arguments],
            env={**environment, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop the process in order
        )
    try:
        deadline = time.monotonic() + STARTUP_S
        while True:
            status = process.poll()
            printed = "".join(path.read_text(encoding="utf-8", errors="replace") for path in (output, log))
            if status is None and (found := ready(printed)) is not None:
                break
            problem = (
                f"did not start (status {status})" if status is not None else f"was not ready in {STARTUP_S:.0f} s"
            )
            if status is not None or time.monotonic() > deadline:
                end = "\n".join(printed.splitlines()[-_LOG_LINES:])
                raise ServerError(f"mirror {arguments[0]} {problem}; its log ends:\n{end}")
            time.sleep(_POLL_S)
        yield process, found
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def running_gateway(bundle: Path, variant: Variant) -> Iterator[str]:
    """Start a gateway on a free port, and yield its host and port once an inference succeeds; see `mirror_process`."""

    def healthy(printed: str) -> str | None:
        address = _ADDRESS.search(printed)
        try:
            return address[1] if address and _read_json(f"http://{address[1]}/health") is not None else None
        except ServerError:
            return None

    options = ("--engine", variant.engine.value, "--precision", variant.precision.value, "--port", "0")
    drain = ("--drain", "0")  # without a load balancer nothing must notice the end first
    with (
        tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder,
        mirror_process(Path(folder), "gateway", str(bundle), *options, *drain, ready=healthy) as (_, address),
    ):
        yield address


def _read_json(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise ServerError(f"{url} cannot be read: {error}") from error
