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
from pathlib import Path
from types import TracebackType

from mirror_runtime.client.client import Client
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import ServerError
from mirror_runtime.triton.server import launch
from mirror_runtime.triton.server.control import KEY_HEADER, OWNERS_APIS, Access, ModelControl
from mirror_runtime.triton.server.distribution import Distribution, find_distribution, server_environment
from mirror_runtime.triton.server.processes import alive, cpu_seconds, group_members, kill_group, runners

SHARED_MEMORY = Path("/dev/shm")
STARTUP_S = 180.0
CANDIDATE_NAME = "embed_candidate"
"""A model that is tried before it serves: a folder of this name that a killed deployment left is not loaded."""

_CONFIG_FILE = "config.pbtxt"
_POLL_S = 0.1
_PROBE_S = 10.0
_EXIT_TIMEOUT_S = 5
_LAST_ANSWERS_S = 0.3
_LOG_LINES = 20


class Server:
    """A tritonserver process with one model repository. A context manager: start and ready on entry, gone on exit.

    Every model of the repository is loaded. Models can be loaded and replaced while it runs by whoever has the key
    that is made for it, and by nobody else.

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
        self._key = secrets.token_hex(16)
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

    @property
    def access(self) -> Access:
        """How the owner reaches the running server; `ServerError` when it is not running."""
        return Access(address=f"{_reachable(self.host)}:{self.grpc_port}", key=self._key, pid=self.pid)

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
                [*launcher(), str(distribution.binary), *self._arguments(folder / "backends")],
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
                self.adopt_workers()
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"tritonserver was not ready after {timeout_s:.0f} s; its log ends:\n{self.log_tail()}"
                )
            time.sleep(_POLL_S)

    def adopt_workers(self) -> None:
        """Take the processes that run models now as those that must live: after a model was replaced."""
        self._workers = frozenset(group_members(self.pid)) - {self.pid}

    def check(self, *, workers: bool = True) -> None:
        """See that the server and the processes that run models are alive. Triton's health does not see the latter.

        Args:
            workers: whether to look at the latter.

        Raises:
            ServerError: one of them has ended; the message holds the end of the log.
        """
        self._check_process()
        if workers and not all(map(alive, self._workers)):
            # A server that dies takes its worker along, which may be gone first: the server's end is the cause to name.
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_POLL_S)
            self._check_process()
            raise ServerError(
                "the process that runs the model has died, and Triton does not start it again; "
                f"the log ends:\n{self.log_tail()}"
            )

    def workers_cpu_seconds(self) -> float:
        """Give the processor time that the processes which run models have used."""
        return cpu_seconds(self._workers)

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

    def drain(self, timeout_s: float, cancelled: threading.Event | None = None) -> bool:
        """Refuse new requests as UNAVAILABLE (HTTP 503) and wait until those accepted before are answered.

        Args:
            timeout_s: how long to wait, in seconds.
            cancelled: set from elsewhere to stop waiting.

        Returns:
            Whether all of them were answered.

        Raises:
            ServerError: the server does not do as told.
        """
        deadline = time.monotonic() + timeout_s
        busy = runners(self.pid, MODEL_NAME)
        with ModelControl(self.access) as control:
            control.refuse(MODEL_NAME)
            # The old model's process ends when it has answered its last request.
            while any(map(alive, busy)):
                if time.monotonic() > deadline or (cancelled and cancelled.is_set()):
                    return False
                time.sleep(_POLL_S)
        time.sleep(_LAST_ANSWERS_S)  # until answers that have left the model are with their clients
        return True

    def stop(self, *, grace_s: float = _EXIT_TIMEOUT_S * 2.0) -> None:
        """End the server and remove what it left. Does nothing when it is not running.

        Args:
            grace_s: how long it may take to end by itself, in seconds. Triton waits for open requests and HTTP
                connections, five seconds at most, before it unloads its models. 0 kills it at once.
        """
        process, self._process = self._process, None
        try:
            if process is not None:
                if grace_s > 0:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(grace_s)
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
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in self._models()),
            # Whoever loads a model runs code here: only who has the key may.
            f"--grpc-restricted-protocol={OWNERS_APIS}:{KEY_HEADER}={self._key}",
            f"--http-restricted-api={OWNERS_APIS}:{KEY_HEADER}={self._key}",
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

    def _models(self) -> list[str]:
        try:
            folders = [entry.name for entry in self.repository.iterdir() if (entry / _CONFIG_FILE).is_file()]
        except OSError as error:
            raise ServerError(f"{self.repository} cannot be read: {error.strerror}") from error
        return sorted(set(folders) - {CANDIDATE_NAME})

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


def launcher() -> list[str]:
    """Give the command prefix that ties a process's life to ours.

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
