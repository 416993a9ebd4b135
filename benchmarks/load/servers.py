"""The servers that are put under load: Triton with its statistics, `mirror gateway`, and `mirror serve` as a whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from benchmarks.plan import Variant
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import ServerError
from mirror_runtime.gateway.settings import KEY_VARIABLE
from mirror_runtime.triton.server.processes import alive
from mirror_runtime.triton.server.server import Server, launcher
from mirror_runtime.triton.server.workspace import SHARED_MEMORY

T = TypeVar("T")

Row = tuple[str, str, Sequence[float]]
"""Metric, unit and samples."""

Statistics = Callable[[], Sequence[Row]]

STARTUP_S = 180.0
STOP_S = 10.0

ALL = "all"
"""Label of all processes, and of all requests, together."""

END_S = 60.0
"""From SIGTERM to the end: longer than `mirror serve` waits for the requests that it has accepted."""

SETTLE_S = 0.1
"""Triton counts a request a moment after it has answered it."""

_HOST = "127.0.0.1"
_POLL_S = 0.05
_LOG_LINES = 5
_ADDRESS = re.compile(rf"^TEI\s+http://({re.escape(_HOST)}:\d+)/embed$", re.MULTILINE)


def triton_statistics(server: Server) -> Statistics:
    """Return a function that reads Triton's own statistics of the requests since its last call.

    They are the mean time that a request waited and was in the model, and the mean number of texts that shared an
    execution; nothing if no request was answered.

    Raises:
        ServerError: the counters cannot be read.
    """

    def counters() -> Counter[str]:
        time.sleep(SETTLE_S)
        stats = _read_json(f"http://{_HOST}:{server.http_port}/v2/models/{MODEL_NAME}/stats")["model_stats"][0]
        times = stats["inference_stats"]
        return Counter(
            texts=stats["inference_count"],
            executions=stats["execution_count"],
            requests=times["success"]["count"],
            queue_ns=times["queue"]["ns"],
            compute_ns=sum(times[part]["ns"] for part in ("compute_input", "compute_infer", "compute_output")),
        )

    before = counters()

    def take() -> list[Row]:
        nonlocal before
        now = counters()
        gained, before = now - before, now
        if not gained["requests"] or not gained["executions"]:
            return []
        return [
            ("queue time", "ms", [gained["queue_ns"] / gained["requests"] / 1e6]),
            ("compute time", "ms", [gained["compute_ns"] / gained["requests"] / 1e6]),
            ("texts per execution", "", [gained["texts"] / gained["executions"]]),
        ]

    return take


@contextmanager
def mirror_process(
    *arguments: str, ready: Callable[[str], T | None]
) -> Iterator[tuple[subprocess.Popen[bytes], Path, T]]:
    """Run a `mirror` command that serves, and stop it on exit.

    Call it in the main thread: the process is ended when the thread that started it ends.

    Args:
        arguments: of `mirror`.
        ready: receives what it has printed so far; returns None until it serves.

    Yields:
        The process, a folder with its standard error in `log` and its temporary files in `tmp`, and `ready`'s result.

    Raises:
        ServerError: it ended or was not ready in time; the message has the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        temporary, output, log = (Path(folder) / name for name in ("tmp", "output", "log"))
        temporary.mkdir()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)}
        environment.pop(KEY_VARIABLE, None)  # our callers have no API key
        with output.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(
                [*launcher(), sys.executable, "-m", "mirror_runtime.cli", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop the process in order
            )
        try:
            deadline, found = time.monotonic() + STARTUP_S, None
            while found is None:
                time.sleep(_POLL_S)
                status = process.poll()
                printed = "".join(path.read_text(encoding="utf-8", errors="replace") for path in (output, log))
                if status is not None or time.monotonic() > deadline:
                    problem = "was not ready in time" if status is None else f"did not start (status {status})"
                    end = "\n".join(printed.splitlines()[-_LOG_LINES:])
                    raise ServerError(f"mirror {arguments[0]} {problem}; its log ends:\n{end}")
                found = ready(printed)
            yield process, Path(folder), found
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
        with suppress(ServerError):
            if address and _read_json(f"http://{address[1]}/health") is not None:
                return address[1]
        return None

    options = ["--engine", variant.engine.value, "--precision", variant.precision.value, "--port", "0"]
    options += ["--drain", "0"]  # without a load balancer nothing must notice the end first
    with mirror_process("gateway", str(bundle), *options, ready=healthy) as (_, _, address):
        yield address


class Ending(NamedTuple):
    """The server's reaction to SIGTERM.

    `by_itself`: it had ended before. `status`: None if it did not end in time and was killed. `leftovers`: processes,
    shared memory and files that it left behind.
    """

    by_itself: bool
    status: int | None
    seconds: float
    leftovers: tuple[str, ...]


class ServedBundle:
    """A running `mirror serve` with its output and temporary files in `folder`, at an address for each protocol."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, addresses: dict[str, str]) -> None:
        self._process, self._folder, self.addresses = process, folder, addresses
        self._last: dict[psutil.Process, str] = {}  # those that ran when a tritonserver was last seen

    @property
    def log(self) -> list[str]:
        """Lines that it has written to standard error so far."""
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()

    @property
    def running(self) -> bool:
        """Whether `mirror serve` has not ended."""
        return self._process.poll() is None

    @property
    def restarts(self) -> int:
        """How often it has reported that it serves again after its tritonserver had ended."""
        return sum("serving again" in line for line in self.log)

    def processes(self) -> dict[psutil.Process, str]:
        """Name its living processes: "mirror serve", and those below it by the system's names."""
        named: dict[psutil.Process, str] = {}
        with suppress(psutil.NoSuchProcess):
            named[root := psutil.Process(self._process.pid)] = "mirror serve"
            for process in root.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    named[process] = process.name()
        self._last = named if len(named) > 1 else self._last
        return named

    def memory(self) -> dict[str, float]:
        """Measure the resident memory of the processes of each name and of `ALL`, in MB; shared pages count in each."""
        sizes: Counter[str] = Counter()
        for process, name in self.processes().items():
            with suppress(psutil.NoSuchProcess):
                sizes.update(dict.fromkeys((name, ALL), process.memory_info().rss))
        return {name: size / 1e6 for name, size in sizes.items() if size}

    def end(self) -> Ending:
        """Send SIGTERM, wait for the end, and look for leftover processes, shared memory and files."""
        self.processes()  # those running now must be gone afterwards
        by_itself, began, status = not self.running, time.monotonic(), None
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(END_S)
        seconds = time.monotonic() - began
        leftovers = (
            *(f"process {process.pid} ({name})" for process, name in self._last.items() if alive(process.pid)),
            *(f"shared memory {region.name}" for region in self._shared_memory()),
            *(f"temporary file {path.name}" for path in sorted((self._folder / "tmp").iterdir())),
        )
        return Ending(by_itself, status, seconds, leftovers)

    def clear(self) -> None:
        """Kill what still runs and remove what it left."""
        self.processes()
        for process in self._last:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(self._last), STOP_S)
        for region in self._shared_memory():
            region.unlink(missing_ok=True)

    def _shared_memory(self) -> list[Path]:
        return sorted(SHARED_MEMORY.glob(f"mirror_{self._process.pid}_*"))


@contextmanager
def served_bundle(bundle: Path, *options: str) -> Iterator[ServedBundle]:
    """Serve a bundle on free ports of the loopback address with options of `mirror serve`; gone on exit.

    Raises:
        ServerError: it did not start.
    """
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    with mirror_process("serve", str(bundle), *options, *ports, ready=_addresses) as found:
        server = ServedBundle(*found)
        try:
            yield server
        finally:
            server.clear()


def _addresses(printed: str) -> dict[str, str] | None:
    """Read host and port by protocol; None until `mirror serve` has printed all of its addresses."""
    words = {word: rest for word, _, rest in (line.partition(" ") for line in printed.splitlines())}
    if not {"gRPC", "HTTP", "metrics"} <= words.keys():
        return None
    return {"grpc": words["gRPC"].strip(), "http": words["HTTP"].split("/")[2]}


def _read_json(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise ServerError(f"{url} cannot be read: {error}") from error
