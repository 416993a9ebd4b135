"""`mirror serve` as a process of its own: where it listens, the memory of its processes, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from benchmarks.soaking.observations import Ending, Process
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import ServerError
from mirror_runtime.triton.server.processes import alive, group_members, kill_group, resident_bytes, runners
from mirror_runtime.triton.server.server import SHARED_MEMORY, STARTUP_S, launcher

END_S = 60.0
"""From SIGTERM to the end: longer than `mirror serve` waits for the requests that it has accepted."""


class ServedBundle:
    """`mirror serve` on free ports of the loopback address. A context manager: serving on entry, gone on exit.

    It has a temporary folder of its own, so that its leftover files can be told from those of other programs. Enter it
    in the main thread: the server is ended when the thread that started it ends.

    Args:
        bundle: the folder.
        options: of `mirror serve`, except its ports.

    Attributes:
        log: lines that it has written to standard error so far.
        addresses: host and port by protocol.
    """

    def __init__(self, bundle: Path, *options: str) -> None:
        serve = [sys.executable, "-m", "mirror_runtime.cli", "serve", str(bundle), *options]
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        self._command = [*launcher(), *serve, *ports]
        self.log: list[str] = []
        self.addresses: dict[str, str] = {}
        self._last: dict[int, str] = {}

    def __enter__(self) -> ServedBundle:
        self._folder = tempfile.TemporaryDirectory(prefix="mirror-soak-")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": self._folder.name},
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop the server in order
        )
        self._listening = threading.Event()
        assert self._process.stdout is not None  # PIPE
        assert self._process.stderr is not None  # PIPE
        self._readers = [
            threading.Thread(target=self._read_addresses, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_log, args=(self._process.stderr,), daemon=True),
        ]
        try:
            for reader in self._readers:
                reader.start()
            self._wait()
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    @property
    def running(self) -> bool:
        """Whether `mirror serve` has not ended."""
        return self._process.poll() is None

    def processes(self) -> tuple[Process, ...]:
        """List the server's living processes with their resident memory, tritonserver's own children included."""
        serve = self._process.pid
        named = {serve: "mirror serve"}
        for server in _children(serve):
            named |= dict.fromkeys(group_members(server), "other")
            named |= dict.fromkeys(runners(server, MODEL_NAME), "model")
            named[server] = "tritonserver"
        if len(named) > 1:
            self._last = named
        sizes = {pid: resident_bytes([pid]) for pid in named}
        return tuple(
            Process(name=name, pid=pid, resident_mb=sizes[pid] / 1e6) for pid, name in named.items() if sizes[pid]
        )

    def end(self) -> Ending:
        """Send SIGTERM, wait for the end, and look for leftover processes, shared memory and files."""
        self.processes()  # those running now must be gone afterwards
        by_itself, began = not self.running, time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        status: int | None
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            status = None
        seconds = time.monotonic() - began
        leftovers = (
            *(f"process {pid} ({name})" for pid, name in self._last.items() if alive(pid)),
            *(f"shared memory {region.name}" for region in self._shared_memory()),
            *(f"temporary file {path.name}" for path in sorted(Path(self._folder.name).iterdir())),
        )
        return Ending(by_itself=by_itself, status=status, seconds=seconds, leftovers=leftovers)

    def _shared_memory(self) -> list[Path]:
        return sorted(SHARED_MEMORY.glob(f"mirror_{self._process.pid}_*"))

    def _wait(self) -> None:
        if not self._listening.wait(STARTUP_S):
            raise ServerError(f"mirror serve was not ready after {STARTUP_S:.0f} s")
        if len(self.addresses) < 2:
            self._readers[1].join()
            raise ServerError("mirror serve did not start: " + "\n".join(self.log))

    def _clear(self) -> None:
        """Kill what still runs and remove what it left."""
        servers = {*_children(self._process.pid), *(p for p, name in self._last.items() if name == "tritonserver")}
        self._process.kill()
        self._process.wait()
        for server in servers:
            kill_group(server)
        for reader in self._readers:
            reader.join()
        for region in self._shared_memory():
            region.unlink(missing_ok=True)
        self._folder.cleanup()

    def _read_addresses(self, stream: IO[str]) -> None:
        """Read the addresses, then all further output, so that the server never blocks on a full pipe."""
        with stream:
            for line in stream:
                if line.startswith("gRPC"):
                    self.addresses["grpc"] = line.split()[1]
                elif line.startswith("HTTP"):
                    self.addresses["http"] = line.split("/")[2]
                elif line.startswith("metrics"):
                    self._listening.set()
        self._listening.set()  # it has ended: do not wait for its addresses

    def _read_log(self, stream: IO[str]) -> None:
        with stream:
            self.log += (line.rstrip("\n") for line in stream)


def _children(parent: int) -> list[int]:
    """List the living child processes of a process."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has just ended
        state, its_parent = text.rpartition(")")[2].split()[:2]
        if int(its_parent) == parent and state not in ("Z", "X"):
            children.append(int(folder.name))
    return children
