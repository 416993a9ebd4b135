"""Run the real tritonserver of the nvidia-pytriton wheel on this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import mirror_runtime
from mirror_runtime.client.client import Client
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import ServerError
from mirror_runtime.serving_process import allow_open_files
from mirror_runtime.triton.model.draining import DRAIN_VARIABLE, drained_file
from mirror_runtime.triton.server import launch
from mirror_runtime.triton.server.control import KEY_HEADER, OWNERS_APIS, Access
from mirror_runtime.triton.server.deploy_lock import CANDIDATE_NAME
from mirror_runtime.triton.server.distribution import Distribution, find_distribution, server_environment
from mirror_runtime.triton.server.processes import alive, cpu_seconds, group_members, kill_group, runners, stopped
from mirror_runtime.triton.server.workspace import Workspace

STARTUP_S = 180.0

_CONFIG_FILE = "config.pbtxt"
_DESCRIPTORS = 256
_POLL_S = 0.1
_PROBE_S = 10.0
_EXIT_TIMEOUT_S = 5
_DRAIN_FILE = "drain"
_DRAIN_POLL_S = 0.02
_FIRST_REQUESTS_S = 0.2
"""How long requests are still accepted that were sent before the signal, and are on their way to the model."""

_LAST_REPLIES_S = 0.1
"""How long Triton must be idle once the model has sent its last reply: it passes replies on meanwhile."""

_STILL_BUSY = 0.2
_LONGEST_BUSY_S = 1.0
"""How long it may use more than that part of a core: clients that go on asking keep it busy as well."""

_LOG_LINES = 20


class Server:
    """A tritonserver process with one model repository. A context manager: ready on entry, stopped on exit.

    It loads every model of the repository. While it runs, only the holder of its generated key can load or replace
    models.

    Args:
        repository: the model repository; it must contain the model `embed`.
        host: the IPv4 address or name on which the three ports listen. Triton has no authentication: any address but
            this machine's own opens the model, and its memory, to the network.
        http_port: 0 picks a free port; so do the others.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.

    Attributes:
        host: as passed.
        http_port: the port in use after `start`; so are the others.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.
        shared_memory_prefix: of the names of its shared memory in /dev/shm, since the last `start`.
    """

    shared_memory_prefix = ""

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
        self._key = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._workspace: Workspace | None = None
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
        """The address and key of the running server.

        Raises:
            ServerError: it is not running.
        """
        return Access(address=f"{_reachable(self.host)}:{self.grpc_port}", key=self._key, pid=self.pid)

    def start(self) -> None:
        """Start the process. It is ready when `wait_ready` returns.

        Raises:
            ServerError: a port is in use, this process may open too few files, or this machine cannot run the server.
            MissingExtra: the wheel is not installed.
        """
        if self._process is not None:
            raise ServerError("the server is already running: call stop() first")
        _check_descriptors()
        distribution = find_distribution()
        environment = server_environment(distribution)
        self._workspace = workspace = Workspace()  # first: it ends a server that a killed process has left on the ports
        self.shared_memory_prefix = f"mirror_{workspace.token}_"
        environment["TMPDIR"] = str(workspace.folder)
        environment[DRAIN_VARIABLE] = str(workspace.folder / _DRAIN_FILE)
        try:
            self._take_ports()
            _assemble_backends(distribution, workspace.folder / "backends")
            with (workspace.folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [*launcher(), str(distribution.binary), *self._arguments(workspace)],
                    env=environment,
                    # The stub ignores PYTHONPATH and imports from its working directory first: this code shall serve.
                    cwd=Path(mirror_runtime.__file__).parents[1],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C reaches only us; we stop the server in order
                )
        except BaseException:
            self.stop()
            raise

    def wait_ready(self, timeout_s: float = STARTUP_S, cancelled: threading.Event | None = None) -> None:
        """Wait until a real inference succeeds.

        Args:
            timeout_s: how long, in seconds.
            cancelled: set by another thread to stop waiting; then the method returns before the server is ready.

        Raises:
            ServerError: the process ended or the time is over; the message quotes the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not (cancelled and cancelled.is_set()):
            self._check_process()
            if self._workspace and len(group_members(self.pid)) > 1:
                self._workspace.claim_python_environment()
            if self._answers():
                self._adopt_workers()
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"tritonserver was not ready after {timeout_s:.0f} s; its log ends:\n{self.log_tail()}"
                )
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Check that the server and the processes that run models are alive. Triton's health does not cover the latter.

        A model that was replaced takes its process with it, when the new one has a process already.

        Raises:
            ServerError: one of them has ended; the message quotes the end of the log.
        """
        self._check_process()
        if all(map(alive, self._workers)):
            return
        running = set(runners(self.pid, MODEL_NAME))
        if running - self._workers:
            self._adopt_workers(replaced=running & self._workers)
            return
        # A dying server ends its workers, perhaps before itself; then the server's end is the cause to report.
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_S)
        self._check_process()
        raise ServerError(
            "the process that runs the model has died, and Triton does not restart it; "
            f"the log ends:\n{self.log_tail()}"
        )

    def stopped(self) -> bool:
        """Return whether a signal has stopped one of the processes (SIGSTOP)."""
        return any(map(stopped, (self.pid, *self._workers)))

    def workers_cpu_seconds(self) -> float:
        """Return the CPU time of the processes that run models."""
        return cpu_seconds(self._workers)

    def client(self, protocol: str = "grpc", *, timeout_s: float = 60.0) -> Client:
        """Create a client of this server. Close it before `stop`: Triton waits for open HTTP connections."""
        port = self.grpc_port if protocol == "grpc" else self.http_port
        return Client(f"{_reachable(self.host)}:{port}", protocol=protocol, timeout_s=timeout_s)

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """Return the last lines of the server's log, without the tables that Triton prints."""
        if self._workspace is None:
            return ""
        text = (self._workspace.folder / "log").read_text(encoding="utf-8", errors="replace")
        kept = [line for line in text.splitlines() if line and not line.startswith(("+", "|"))]
        return "\n".join(kept[-lines:])

    def drain(self, timeout_s: float, cancelled: threading.Event | None = None) -> bool:
        """Reject new requests as UNAVAILABLE (HTTP 503) and wait until the accepted ones are answered.

        Args:
            timeout_s: how long to wait, in seconds.
            cancelled: set by another thread to stop waiting.

        Returns:
            Whether all of them were answered.

        Raises:
            ServerError: it is not running, or its model cannot be told.
        """
        deadline = time.monotonic() + timeout_s
        busy = runners(self.pid, MODEL_NAME)
        assert self._workspace is not None
        file = self._workspace.folder / _DRAIN_FILE
        time.sleep(_FIRST_REQUESTS_S)
        try:
            file.touch()
        except OSError as error:
            raise ServerError(f"{file} cannot be written: {error.strerror}") from error
        while any(alive(pid) and not drained_file(file, pid).exists() for pid in busy):
            if time.monotonic() > deadline or (cancelled and cancelled.is_set()):
                return False
            time.sleep(_DRAIN_POLL_S)
        self._wait_idle()
        return True

    def stop(self, *, grace_s: float = _EXIT_TIMEOUT_S * 2.0) -> None:
        """Stop the server and remove its temporary files and shared memory. Does nothing if it is not running.

        Args:
            grace_s: how long it may take to end after SIGTERM, in seconds. Triton waits for open requests and HTTP
                connections, for up to five seconds, before it unloads its models. 0 kills it immediately.
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
            workspace, self._workspace = self._workspace, None
            if workspace is not None:
                workspace.close()

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_idle(self) -> None:
        deadline, busy = time.monotonic() + _LONGEST_BUSY_S, True
        while busy and time.monotonic() < deadline:
            used_s = cpu_seconds([self.pid])
            time.sleep(_LAST_REPLIES_S)
            busy = cpu_seconds([self.pid]) - used_s >= _STILL_BUSY * _LAST_REPLIES_S

    def _take_ports(self) -> None:
        """Replace zeros by free ports, and check that the others are free."""
        with contextlib.ExitStack() as held:  # held together, so that no free port is picked twice
            for flag in ("http_port", "grpc_port", "metrics_port"):
                port = getattr(self, flag)
                listener = held.enter_context(socket.socket())
                # Lingering connections of an earlier server do not occupy the port; a listener does.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((self.host, port))
                    listener.listen()
                except (OSError, OverflowError) as error:
                    reason = getattr(error, "strerror", None) or str(error)
                    raise ServerError(
                        f"port {port} on {self.host} cannot be used: {reason}. Stop what listens there, or choose "
                        f"another with --{flag.replace('_', '-')} (0 picks a free one)"
                    ) from error
                setattr(self, flag, listener.getsockname()[1])

    def _arguments(self, workspace: Workspace) -> list[str]:
        return [
            f"--model-repository={self.repository.absolute()}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in self._models()),
            # Loading a model runs its code: only the holder of the key may.
            f"--grpc-restricted-protocol={OWNERS_APIS}:{KEY_HEADER}={self._key}",
            f"--http-restricted-api={OWNERS_APIS}:{KEY_HEADER}={self._key}",
            "--disable-auto-complete-config",
            f"--backend-directory={workspace.folder / 'backends'}",
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

    def _adopt_workers(self, replaced: Iterable[int] = ()) -> None:
        """Watch the processes that run models now, except those being replaced and one that a deployment tries out."""
        others = {self.pid, *replaced, *runners(self.pid, CANDIDATE_NAME)}
        self._workers = frozenset(group_members(self.pid)) - others

    def _check_process(self) -> None:
        if self._process is None:
            raise ServerError("the server is not running: call start() first")
        status = self._process.poll()
        if status is not None:
            how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
            raise ServerError(f"tritonserver ended with {how}; its log ends:\n{self.log_tail()}")

    def _answers(self) -> bool:
        try:
            # HTTP and metrics open a moment after gRPC. And a gRPC channel waits longer after each failed connection,
            # so it is created only when a server listens.
            for port in (self.grpc_port, self.http_port, self.metrics_port):
                socket.create_connection((_reachable(self.host), port), timeout=1).close()
        except OSError:
            return False
        with self.client(timeout_s=_PROBE_S) as client:
            return client.ready()


def _check_descriptors() -> None:
    """Check the limit on open files: with too few, Triton accepts connections and answers none of them."""
    limit = allow_open_files(_DESCRIPTORS)
    if limit < _DESCRIPTORS:
        raise ServerError(
            f"this process may open {limit} files, and tritonserver needs {_DESCRIPTORS}, and one more for each "
            "connection: raise the limit, such as with ulimit -n 4096"
        )


def launcher() -> list[str]:
    """Return the command prefix that ends a process when this one dies.

    The kernel sends the signal when the *thread* that started the process ends, so the prefix is empty outside of the
    main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [sys.executable, "-I", launch.__file__, str(os.getpid())]


def _assemble_backends(distribution: Distribution, backends: Path) -> None:
    """Assemble a backend folder with the stub of this Python version, without writing into site-packages."""
    python = backends / "python"
    python.mkdir(parents=True)
    for part in distribution.python_backend.iterdir():
        if part.is_file():
            (python / part.name).symlink_to(part)
    (python / distribution.stub.name).symlink_to(distribution.stub)


def _reachable(host: str) -> str:
    """Return the address at which a client on this machine reaches a server that listens on `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host
