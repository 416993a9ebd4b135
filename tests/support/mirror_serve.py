"""`mirror serve` as a separate process, and some load on it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirror_runtime.serving_process import STOP_SIGNALS
from mirror_runtime.triton import ServiceOptions, ServingOptions, serve
from mirror_runtime.triton.server.health import HealthPolicy
from mirror_runtime.triton.server.processes import kill_group, runners
from mirror_runtime.triton.server.workspace import SHARED_MEMORY
from tests.support.paths import ROOT


class MirrorServe:
    """`mirror serve`: ready on entry, killed on exit if it still runs."""

    def __init__(self, source: Path, *options: str, impatient: bool = False, temporary: Path | None = None) -> None:
        run = [__name__] if impatient else ["mirror_runtime.cli", "serve"]
        ports = [] if impatient else ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        self.source = source
        self._command = [sys.executable, "-m", *run, str(source), *options, *ports]
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._environment |= {"TMPDIR": str(temporary)} if temporary else {}
        self.lines: list[str] = []

    def __enter__(self) -> "MirrorServe":
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # Under nohup or a shell's & the tests ignore some of them, and so would the command.
        pipes["preexec_fn"] = lambda: [signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS]
        self.process = subprocess.Popen(self._command, text=True, cwd=ROOT, env=self._environment, **pipes)
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._ready.wait(60), self.output
        assert self.process.poll() is None, self.output
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # a test failed, and nothing else ends its processes
            server = self.tritonserver
            self.process.kill()
            kill_group(server)
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for region in self.shared_memory():
            region.unlink(missing_ok=True)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def grpc(self) -> str:
        return next(line.split()[1] for line in self.lines if line.startswith("gRPC"))

    @property
    def http(self) -> str:
        return next(line.split("/")[2] for line in self.lines if line.startswith("HTTP"))

    @property
    def tritonserver(self) -> int:
        listing = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listing.splitlines()]
        return next(int(pid) for pid, parent, name in rows if int(parent) == self.process.pid and "triton" in name)

    def runner(self) -> int:
        """Return the process that runs the model."""
        return runners(self.tritonserver, "embed")[0]

    def shared_memory(self) -> list[Path]:
        return list(SHARED_MEMORY.glob(f"mirror_{self.process.pid}_*"))

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("metrics"):
                self._ready.set()
        self._ready.set()


@dataclass(frozen=True)
class Outcome:
    """One request: when it began and ended, and its result or exception."""

    began: float
    ended: float
    result: object


class Load:
    """Callers that send one request after the other, each in a thread of its own, until the block ends.

    What a caller returns or raises is an outcome.
    """

    def __init__(self, callers: Sequence[Callable[[], object]], pause_s: float = 0.0) -> None:
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(caller,)) for caller in callers]
        self.outcomes: list[Outcome] = []

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Send no further requests, and wait for those under way."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a request hangs"

    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if isinstance(outcome.result, Exception)]

    def _call(self, caller: Callable[[], object]) -> None:
        while not self._stopping.wait(self._pause_s):
            began = time.monotonic()
            try:
                result: object = caller()
            except Exception as error:
                result = error
            self.outcomes.append(Outcome(began, time.monotonic(), result))


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


if __name__ == "__main__":  # `mirror serve` with a watchdog that waits a short time
    serve(
        Path(sys.argv[1]),
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        options=ServingOptions(engine="fake"),
        service=ServiceOptions(health=HealthPolicy(probe_s=0.2, silent_s=1.5)),
        on_ready=lambda server: print(f"gRPC     127.0.0.1:{server.grpc_port}\nmetrics", flush=True),  # noqa: T201
        on_progress=lambda line: print(line, flush=True),  # noqa: T201
    )
