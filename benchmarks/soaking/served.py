"""`mirror serve` under a soak: where it listens, the memory of its processes, and what it leaves behind."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.load.servers import mirror_process
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.triton.server.processes import alive, group_members, kill_group, resident_bytes, runners
from mirror_runtime.triton.server.server import SHARED_MEMORY

ALL = "all"
"""Label of all processes, and of all requests, together."""

END_S = 60.0
"""From SIGTERM to the end: longer than `mirror serve` waits for the requests that it has accepted."""


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
        self._last: dict[int, str] = {}
        self._server: int | None = None
        self.restarts = 0

    @property
    def log(self) -> list[str]:
        """Lines that it has written to standard error so far."""
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()

    @property
    def running(self) -> bool:
        """Whether `mirror serve` has not ended."""
        return self._process.poll() is None

    def processes(self) -> dict[int, str]:
        """Name the server's living processes: "mirror serve", "tritonserver", "model" for what runs it, or "other"."""
        named = {self._process.pid: "mirror serve"}
        for server in _children(self._process.pid):
            named |= dict.fromkeys(group_members(server), "other")
            named |= dict.fromkeys(runners(server, MODEL_NAME), "model")
            named[server] = "tritonserver"
            self.restarts += self._server not in (None, server)
            self._server = server
        if len(named) > 1:
            self._last = named
        return named

    def memory(self) -> dict[str, float]:
        """Measure the resident memory of the processes of each name and of `ALL`, in MB; shared pages count in each."""
        sizes: Counter[str] = Counter()
        for pid, name in self.processes().items():
            sizes.update(dict.fromkeys((name, ALL), resident_bytes([pid])))
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
            *(f"process {pid} ({name})" for pid, name in self._last.items() if alive(pid)),
            *(f"shared memory {region.name}" for region in self._shared_memory()),
            *(f"temporary file {path.name}" for path in sorted((self._folder / "tmp").iterdir())),
        )
        return Ending(by_itself, status, seconds, leftovers)

    def clear(self) -> None:
        """Kill what still runs and remove what it left."""
        servers = {*_children(self._process.pid), *(p for p, name in self._last.items() if name == "tritonserver")}
        self._process.kill()
        self._process.wait()
        for server in servers:
            kill_group(server)
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


def _children(parent: int) -> list[int]:
    """List the living child processes of a process."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            if int(text.rpartition(")")[2].split()[1]) == parent and alive(int(folder.name)):
                children.append(int(folder.name))
    return children
