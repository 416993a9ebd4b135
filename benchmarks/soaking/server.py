"""`mirror serve` under a soak: where it listens, the memory of its processes, and what it leaves behind."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.load.servers import mirror_process
from benchmarks.soaking.observations import ALL, Ending, MemorySample
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.triton.server.processes import alive, group_members, kill_group, resident_bytes, runners
from mirror_runtime.triton.server.server import SHARED_MEMORY

END_S = 60.0
"""From SIGTERM to the end: longer than `mirror serve` waits for the requests that it has accepted."""


class ServedBundle:
    """A running `mirror serve`.

    Args:
        process: of the command.
        folder: see `mirror_process`. Leftover files in it can be told from those of other programs.
        addresses: host and port by protocol.
    """

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, addresses: dict[str, str]) -> None:
        self._process, self._folder, self.addresses = process, folder, addresses
        self._last: dict[int, str] = {}

    @property
    def log(self) -> tuple[str, ...]:
        """Lines that it has written to standard error so far."""
        return tuple((self._folder / "log").read_text(encoding="utf-8", errors="replace").splitlines())

    @property
    def running(self) -> bool:
        """Whether `mirror serve` has not ended."""
        return self._process.poll() is None

    def processes(self) -> dict[int, str]:
        """Name the server's living processes: "mirror serve", "tritonserver", "model" for what runs it, or "other"."""
        serve = self._process.pid
        named = {serve: "mirror serve"}
        for server in _children(serve):
            named |= dict.fromkeys(group_members(server), "other")
            named |= dict.fromkeys(runners(server, MODEL_NAME), "model")
            named[server] = "tritonserver"
        if len(named) > 1:
            self._last = named
        return named

    def memory(self, at_s: float) -> MemorySample:
        """Measure the resident memory of the server's processes."""
        sums: dict[str, float] = {}
        server = None
        for pid, name in self.processes().items():
            if size := resident_bytes([pid]):
                server = pid if name == "tritonserver" else server
                for key in (name, ALL):
                    sums[key] = sums.get(key, 0.0) + size / 1e6
        return MemorySample(at_s=at_s, server=server, resident_mb=sums)

    def end(self) -> Ending:
        """Send SIGTERM, wait for the end, and look for leftover processes, shared memory and files."""
        self.processes()  # those running now must be gone afterwards
        by_itself, began = not self.running, time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            status: int | None = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            status = None
        seconds = time.monotonic() - began
        leftovers = (
            *(f"process {pid} ({name})" for pid, name in self._last.items() if alive(pid)),
            *(f"shared memory {region.name}" for region in self._shared_memory()),
            *(f"temporary file {path.name}" for path in sorted((self._folder / "tmp").iterdir())),
        )
        return Ending(by_itself=by_itself, status=status, seconds=seconds, leftovers=leftovers)

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
    with (
        tempfile.TemporaryDirectory(prefix="mirror-soak-") as folder,
        mirror_process(Path(folder), "serve", str(bundle), *options, *ports, ready=_addresses) as (process, addresses),
    ):
        server = ServedBundle(process, Path(folder), addresses)
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
        try:
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has just ended
        if int(text.rpartition(")")[2].split()[1]) == parent and alive(int(folder.name)):
            children.append(int(folder.name))
    return children
