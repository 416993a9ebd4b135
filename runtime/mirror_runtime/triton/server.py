"""Run the real tritonserver of the nvidia-pytriton wheel on this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from mirror_runtime.bundle import read_manifest
from mirror_runtime.errors import ServerError
from mirror_runtime.selection import choose
from mirror_runtime.tokens import LongTexts
from mirror_runtime.triton import launch
from mirror_runtime.triton.client import Client
from mirror_runtime.triton.distribution import Distribution, find_distribution, server_environment
from mirror_runtime.triton.processes import group_members, kill_group
from mirror_runtime.triton.repository import ServingOptions, write_temporary_repository

SHARED_MEMORY = Path("/dev/shm")
STARTUP_S = 180.0
_POLL_S = 0.1
_PROBE_S = 10.0
_EXIT_TIMEOUT_S = 5
_LOG_LINES = 20


class Server:
    """A tritonserver process with one model repository. A context manager: start and ready on entry, gone on exit.

    Args:
        repository: the model repository; it must hold the model `embed`.
        host: the IPv4 address or name that the three ports listen on. Triton asks nobody for a password: anything but
            this machine's own address opens the model, and its memory, to the network.
        http_port: 0 picks a free one; so do the others.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.

    Attributes:
        host: as given.
        http_port: the port in use once started; so are the others.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
    ) -> None:
        self.repository = repository
        self.host = host
        self.http_port, self.grpc_port, self.metrics_port = http_port, grpc_port, metrics_port
        # Names our regions in /dev/shm, so that what a killed server leaves can be told from other people's.
        self.shared_memory_prefix = f"mirror_{os.getpid()}_{secrets.token_hex(4)}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._workers: frozenset[int] = frozenset()

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            ServerError: it is not running.
        """
        if self._process is None:
            raise ServerError("the server is not running: call start() first")
        return self._process.pid

    def start(self) -> None:
        """Start the process. It is ready only when `wait_ready` returns.

        Raises:
            ServerError: a port is in use, or this machine cannot run the server.
            MissingExtra: the wheel is not installed.
        """
        if self._process is not None:
            raise ServerError("the server runs already: stop() it first")
        distribution = find_distribution()
        environment = server_environment(distribution)
        self._take_ports()
        self._folder = tempfile.TemporaryDirectory(prefix="mirror-triton-")
        folder = Path(self._folder.name)
        _assemble_backends(distribution, folder / "backends")
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*_launcher(), str(distribution.binary), *self._arguments(folder / "backends")],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop the server in order
            )

    def wait_ready(self, timeout_s: float = STARTUP_S, cancelled: threading.Event | None = None) -> None:
        """Wait until a real inference succeeds.

        Args:
            timeout_s: how long, in seconds.
            cancelled: set from elsewhere to stop waiting; the method then returns without the server being ready.

        Raises:
            ServerError: the process ended or the time is over; the message holds the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not (cancelled and cancelled.is_set()):
            self._check_process()
            if self._answers():
                self._workers = frozenset(group_members(self.pid)) - {self.pid}
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"tritonserver was not ready after {timeout_s:.0f} s; its log ends:\n{self.log_tail()}"
                )
            time.sleep(_POLL_S)

    def check(self) -> None:
        """See that the server and the process that runs the model are alive. Triton's health does not see the latter.

        Raises:
            ServerError: one of them has ended; the message holds the end of the log.
        """
        self._check_process()
        if self._workers - frozenset(group_members(self.pid)):
            # A server that dies takes its worker along, which may be gone first: the server's end is the cause to name.
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(1.0)
            self._check_process()
            raise ServerError(
                "the process that runs the model has died, and Triton does not start it again; "
                f"the log ends:\n{self.log_tail()}"
            )

    def client(self, protocol: str = "grpc", *, timeout_s: float = 60.0) -> Client:
        """Make a client of this server. Close it before `stop`: Triton waits for open HTTP connections."""
        port = self.grpc_port if protocol == "grpc" else self.http_port
        return Client(f"{_reachable(self.host)}:{port}", protocol=protocol, timeout_s=timeout_s)

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """Give the last lines of the server's log, without the tables that Triton prints into it."""
        if self._folder is None:
            return ""
        text = (Path(self._folder.name) / "log").read_text(encoding="utf-8", errors="replace")
        kept = [line for line in text.splitlines() if line and not line.startswith(("+", "|"))]
        return "\n".join(kept[-lines:])

    def stop(self) -> None:
        """End the server and remove what it left. Does nothing when it is not running."""
        process, self._process = self._process, None
        try:
            if process is not None:
                process.terminate()
                # Triton gives open requests and connections _EXIT_TIMEOUT_S; then it unloads the model.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_TIMEOUT_S * 2)
                kill_group(process.pid)
                process.wait()
        finally:
            for region in SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
                region.unlink(missing_ok=True)
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _take_ports(self) -> None:
        """Replace zeros by free ports, and see that the others are free."""
        with contextlib.ExitStack() as held:  # held together, so that no free port is picked twice
            for flag in ("http_port", "grpc_port", "metrics_port"):
                asked = getattr(self, flag)
                listener = held.enter_context(socket.socket())
                # Connections that linger from an earlier server do not count; one that listens does.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((self.host, asked))
                    listener.listen()
                except (OSError, OverflowError) as error:
                    reason = getattr(error, "strerror", None) or str(error)
                    raise ServerError(
                        f"port {asked} on {self.host} cannot be used: {reason}. Stop what listens there, or choose "
                        f"another with --{flag.replace('_', '-')} (0 picks a free one)"
                    ) from error
                setattr(self, flag, listener.getsockname()[1])

    def _arguments(self, backends: Path) -> list[str]:
        return [
            f"--model-repository={self.repository}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory_prefix}",
            f"--http-address={self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.metrics_port}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
        ]

    def _check_process(self) -> None:
        if self._process is None:
            raise ServerError("the server is not running: call start() first")
        status = self._process.poll()
        if status is not None:
            how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
            raise ServerError(f"tritonserver ended with {how}; its log ends:\n{self.log_tail()}")

    def _answers(self) -> bool:
        try:
            # HTTP and metrics open a moment after gRPC. And a gRPC channel that once failed to connect waits longer
            # each time, so it is made only when somebody listens.
            for port in (self.grpc_port, self.http_port, self.metrics_port):
                socket.create_connection((_reachable(self.host), port), timeout=1).close()
        except OSError:
            return False
        with self.client(timeout_s=_PROBE_S) as client:
            return client.ready()


def serve(
    bundle: Path,
    *,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    host: str = "127.0.0.1",
    engine: str = "auto",
    precision: str = "auto",
    streams: int | None = None,
    long_texts: LongTexts = LongTexts.TRUNCATE,
    max_batch_size: int = 256,
    on_ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve a bundle until SIGINT or SIGTERM arrives, then stop in order and return. Call it from the main thread.

    Args:
        bundle: the bundle's folder.
        http_port: 0 picks a free one; so do the others.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.
        host: see `Server`.
        engine: see `ServingOptions`; so are the following three.
        precision: see `ServingOptions`.
        streams: see `ServingOptions`.
        long_texts: see `ServingOptions`.
        max_batch_size: see `ServingOptions`.
        on_ready: called once with the server when a real inference has succeeded.

    Raises:
        BundleError: `bundle` is no bundle.
        EngineError: the bundle has nothing that runs here as asked.
        MissingExtra: the server's wheel or tritonclient is not installed.
        ServerError: the server did not start, or died.
    """
    options = ServingOptions(
        engine=engine,
        precision=precision,
        streams=streams,
        long_texts=long_texts,
        max_batch_size=max_batch_size,
    )
    choose(read_manifest(bundle), engine, precision)  # an impossible wish ends here, not in Triton's log
    with tempfile.TemporaryDirectory(prefix="mirror-repository-") as folder, _signals() as stopping:
        write_temporary_repository(bundle, Path(folder), options)
        server = Server(Path(folder), host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)
        try:
            server.start()
            server.wait_ready(cancelled=stopping)
            if on_ready is not None and not stopping.is_set():
                on_ready(server)
            while not stopping.wait(1.0):
                server.check()
        finally:
            server.stop()


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event: an exception at an arbitrary place could lose a process just started."""
    stopping = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launcher() -> list[str]:
    """Give the command prefix that ties the server's life to ours.

    The kernel's signal comes when the *thread* that started the process ends, so it is of use in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [sys.executable, "-I", launch.__file__, str(os.getpid())]


def _assemble_backends(distribution: Distribution, backends: Path) -> None:
    """Lay out a backend folder with the stub of this Python version, without writing into site-packages."""
    python = backends / "python"
    python.mkdir(parents=True)
    for part in distribution.python_backend.iterdir():
        if part.is_file():
            (python / part.name).symlink_to(part)
    (python / distribution.stub.name).symlink_to(distribution.stub)


def _reachable(host: str) -> str:
    """Give the address that a client on this machine uses for a server that listens on `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host
