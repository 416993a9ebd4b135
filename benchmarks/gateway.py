"""`mirror gateway` as its users run it: a process of its own on loopback, and callers that keep their connection."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.point import Point
from mirror_runtime.errors import ServerError
from mirror_runtime.gateway.settings import KEY_VARIABLE
from mirror_runtime.triton.server.server import launcher

STARTUP_S = 120.0
STOP_S = 10.0
TIMEOUT_S = 60.0
"""Of one request, as our Triton callers' is."""

_HOST = "127.0.0.1"
_POLL_S = 0.05
_LOG_LINES = 5
_ADDRESS = re.compile(rf"^TEI\s+http://{re.escape(_HOST)}:(\d+)/embed$", re.MULTILINE)


class GatewayCaller:
    """Posts texts to /embed over one connection that stays open. Close it at the end.

    Args:
        port: the gateway's, on loopback.
        timeout_s: how long a request may take, in seconds.
    """

    def __init__(self, port: int, timeout_s: float = TIMEOUT_S) -> None:
        self._connection = http.client.HTTPConnection(_HOST, port, timeout=timeout_s)

    def encode(self, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        """Send texts in one request and wait for their vectors, float32 [texts, dim].

        Args:
            texts: at least one.
            batch_size: at least as many as there are texts: a request is never split.

        Raises:
            ServerError: the gateway refused the request, or did not answer it.
        """
        assert len(texts) <= batch_size
        answer = self._exchange("POST", "/embed", json.dumps({"inputs": list(texts)}).encode())
        return np.asarray(answer, np.float32)

    def read(self, path: str) -> Any:
        """Get a route's JSON.

        Raises:
            ServerError: see `encode`.
        """
        return self._exchange("GET", path, None)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _exchange(self, method: str, path: str, body: bytes | None) -> Any:
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # half an exchange spoils a connection; the next request opens a new one
            raise ServerError(f"the gateway did not answer {path}: {error or type(error).__name__}") from error
        if response.status != 200:
            raise ServerError(f"the gateway answered {path} with HTTP {response.status}: {_shown(content)}")
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerError(f"the gateway's answer to {path} is not JSON: {_shown(content)}") from error


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """A running gateway.

    Attributes:
        port: on loopback.
        pid: of its process.
    """

    port: int
    pid: int

    @contextmanager
    def connect(self) -> Iterator[GatewayCaller]:
        """Give a caller with a connection of its own."""
        with closing(GatewayCaller(self.port)) as caller:
            yield caller

    def version(self) -> str:
        """Name the server and its version."""
        with self.connect() as caller:
            return f"mirror gateway {caller.read('/info')['version']}"


@contextmanager
def running_gateway(bundle: Path, point: Point) -> Iterator[Gateway]:
    """Start a gateway on a bundle and a free port; it is healthy on entry, and gone on exit.

    Args:
        bundle: what it serves.
        point: engine and precision to serve it in.

    Raises:
        ServerError: it ended or was not healthy in time; the message holds the end of its log.
    """
    command = [
        *(*launcher(), sys.executable, "-m", "mirror_runtime.cli", "gateway", str(bundle)),
        *("--engine", point.engine.value, "--precision", point.precision.value),
        *("--port", "0", "--drain", "0"),  # nobody balances load here: there is nobody to tell that it stops
    ]
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                env=_without_keys(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop the gateway in order
            )
        try:
            yield Gateway(port=_healthy_port(process, log), pid=process.pid)
        finally:
            _stop(process)


def _healthy_port(process: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until the gateway says where it listens and that inferences succeed."""
    deadline = time.monotonic() + STARTUP_S
    while True:
        said = log.read_text(encoding="utf-8", errors="replace")
        end = "; its log ends:\n" + "\n".join(said.splitlines()[-_LOG_LINES:])
        if process.poll() is not None:
            raise ServerError(f"mirror gateway ended with status {process.returncode}{end}")
        address = _ADDRESS.search(said)
        if address and _is_healthy(int(address[1])):
            return int(address[1])
        if time.monotonic() > deadline:
            raise ServerError(f"mirror gateway was not healthy after {STARTUP_S:.0f} s{end}")
        time.sleep(_POLL_S)


def _is_healthy(port: int) -> bool:
    with closing(GatewayCaller(port)) as caller:
        try:
            caller.read("/health")
        except ServerError:
            return False
        return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end; kill it where it does not."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out the user's API key: our callers have none."""
    return {name: value for name, value in environment.items() if name != KEY_VARIABLE}


def _shown(content: bytes) -> str:
    return content[:200].decode("utf-8", "replace")
