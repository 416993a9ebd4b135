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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plan import Variant
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import ServerError
from mirror_runtime.gateway.settings import KEY_VARIABLE
from mirror_runtime.triton.server.server import Server, launcher

STARTUP_S = 120.0
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
    """Triton's counters since the last call.

    Args:
        server: started; its owner stops it.
    """

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
def running_gateway(bundle: Path, variant: Variant) -> Iterator[str]:
    """Start a gateway on a bundle and a free port, and yield its host and port once it is healthy; stop it on exit.

    Args:
        bundle: that it serves.
        variant: engine and precision to serve it in.

    Raises:
        ServerError: it ended or was not healthy in time; the message has the end of its log.
    """
    command = [
        *(*launcher(), sys.executable, "-m", "mirror_runtime.cli", "gateway", str(bundle)),
        *("--engine", variant.engine.value, "--precision", variant.precision.value),
        *("--port", "0", "--drain", "0"),  # without a load balancer nothing must notice the end first
    ]
    # Our callers have no API key.
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop the gateway in order
            )
        try:
            yield _healthy_address(process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy_address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the gateway has printed its address and an inference succeeds."""
    deadline = time.monotonic() + STARTUP_S
    while True:
        printed = log.read_text(encoding="utf-8", errors="replace")
        end = "; its log ends:\n" + "\n".join(printed.splitlines()[-_LOG_LINES:])
        if process.poll() is not None:
            raise ServerError(f"mirror gateway ended with status {process.returncode}{end}")
        if address := _ADDRESS.search(printed):
            try:
                _read_json(f"http://{address[1]}/health")
            except ServerError:
                pass
            else:
                return address[1]
        if time.monotonic() > deadline:
            raise ServerError(f"mirror gateway was not healthy after {STARTUP_S:.0f} s{end}")
        time.sleep(_POLL_S)


def _read_json(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise ServerError(f"{url} cannot be read: {error}") from error
