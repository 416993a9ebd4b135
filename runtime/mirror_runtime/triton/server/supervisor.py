"""`mirror serve` as a service: start the server, watch it, restart it when it breaks, drain it on SIGTERM."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mirror_runtime.bundle import MANIFEST_FILE, read_manifest
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import InputError, ServerError
from mirror_runtime.selection import choose
from mirror_runtime.serving_process import stop_signals_handled
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from mirror_runtime.triton.server.deploy_lock import ServerFile, clear_killed
from mirror_runtime.triton.server.health import HealthPolicy, Watchdog
from mirror_runtime.triton.server.server import Server
from mirror_runtime.triton.server.workspace import Workspace

_LONGEST_PAUSE_S = 30.0
_LISTENERS_CLOSE_S = 0.2
"""How long a drained server may say goodbye. An idle HTTP connection, which Triton waits for, uses up any time."""


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """When a service restarts its server, and how it ends.

    Attributes:
        health: when a server counts as broken and is restarted.
        max_restarts: restarts within `window_s` after which the service gives up.
        window_s: see `max_restarts`; in seconds.
        drain_s: how long accepted requests may take when the service ends, in seconds.
    """

    health: HealthPolicy = field(default_factory=HealthPolicy)
    max_restarts: int = 5
    window_s: float = 600.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.drain_s < 0:
            raise InputError(
                f"max_restarts is {self.max_restarts} and drain_s {self.drain_s}: they must not be negative"
            )


def serve(
    source: Path,
    *,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    host: str = "127.0.0.1",
    options: ServingOptions | None = None,
    service: ServiceOptions | None = None,
    on_ready: Callable[[Server], None] | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve a bundle or a model repository until SIGINT, SIGTERM, SIGHUP or SIGQUIT arrives; then drain and return.

    Call it from the main thread. A server or model that dies, hangs or fails every request is restarted. After the
    signal, new requests are rejected as UNAVAILABLE (HTTP 503) and accepted ones are answered; a second signal ends it
    immediately.

    Args:
        source: the bundle's folder, or a model repository that contains the model `embed`, which `mirror deploy` can
            replace while it serves.
        http_port: 0 picks a free port; so do the others.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.
        host: see `Server`.
        options: how to serve a bundle; a repository contains its own.
        service: when the server is restarted, and how the service ends.
        on_ready: called once with the server when a real inference has succeeded.
        on_progress: called with a line of text at each event.

    Raises:
        InputError: `options` is passed for a repository, or the repository is already served.
        BundleError: `source` is neither a bundle nor a repository.
        EngineError: the bundle has no artifact that runs here with the options.
        MissingExtra: the server's wheel or tritonclient is not installed.
        ServerError: the server did not start, or broke more often than `max_restarts`.
    """
    service = service or ServiceOptions()
    with _signals() as (first, second), _repository(source, options) as repository, contextlib.ExitStack() as stack:
        server_file = None
        if repository == source:
            try:
                server_file = stack.enter_context(ServerFile(repository))
            except OSError as error:
                on_progress(
                    f"{repository} cannot be written ({error.strerror}): mirror deploy cannot reach this server"
                )
        server = Server(repository, host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)
        supervisor = Supervisor(server, service, first, server_file, on_progress)
        try:
            server.start()
            server.wait_ready(cancelled=first)
            if not first.is_set():
                if server_file:
                    server_file.write(server.access)
                if on_ready is not None:
                    on_ready(server)
                if supervisor.run():
                    _drain(server, service.drain_s, second, on_progress)
            server.stop(grace_s=_LISTENERS_CLOSE_S)
        finally:
            server.stop(grace_s=0.0)


class Supervisor:
    """Restarts a server whenever its watchdog finds it broken, up to a limit; pauses grow while starts fail."""

    def __init__(
        self,
        server: Server,
        options: ServiceOptions,
        stopping: threading.Event,
        server_file: ServerFile | None,
        on_progress: Callable[[str], None],
    ) -> None:
        self._server, self._options, self._stopping = server, options, stopping
        self._server_file, self._on_progress = server_file, on_progress
        self._restarts: deque[float] = deque()
        self._failed_starts = 0  # since the last one that served

    def run(self) -> bool:
        """Watch and restart the server until `stopping` is set; return whether it is serving then."""
        while True:
            with Watchdog(self._server, self._options.health) as watchdog:
                problem = watchdog.watch(self._stopping)
            if not problem:
                return True
            broke_at = time.monotonic()
            while problem:
                problem = self._restart(problem)
                if self._stopping.is_set():
                    return False
            self._on_progress(f"serving again after {time.monotonic() - broke_at:.1f} s")

    def _restart(self, problem: str) -> str:
        """Restart once; return the problem, or an empty string on success."""
        # A hung server does not end by itself. Its clients see closed connections immediately.
        self._server.stop(grace_s=0.0)
        now, limit = time.monotonic(), self._options.max_restarts
        while self._restarts and now - self._restarts[0] > self._options.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= limit:
            raise ServerError(
                f"gave up after {limit} restarts within {self._options.window_s / 60:.0f} minutes; lastly: {problem}"
            )
        self._on_progress(problem)
        pause_s = min(_LONGEST_PAUSE_S, 2.0 ** (self._failed_starts - 1)) if self._failed_starts else 0.0
        self._restarts.append(now)
        when = f" in {pause_s:.0f} s" if pause_s else ""
        self._on_progress(f"restarting{when}: {len(self._restarts)} of {limit} restarts")
        if self._stopping.wait(pause_s):
            return ""
        try:
            clear_killed(self._server.repository)
            self._server.start()
            self._server.wait_ready(cancelled=self._stopping)
        except ServerError as error:
            self._failed_starts += 1
            return str(error)
        self._failed_starts = 0
        if self._server_file:
            self._server_file.write(self._server.access)
        return ""


def _drain(server: Server, timeout_s: float, cancelled: threading.Event, on_progress: Callable[[str], None]) -> None:
    on_progress("stopping: accepted requests are answered, new ones rejected; repeat to stop immediately")
    try:
        if not server.drain(timeout_s, cancelled):
            on_progress("stopped before every request was answered")
    except ServerError as error:
        on_progress(f"not drained: {error}")


@contextlib.contextmanager
def _repository(source: Path, options: ServingOptions | None) -> Iterator[Path]:
    """Yield the model repository to serve: the source itself, or a temporary one that refers to the bundle."""
    clear_killed(source)
    if (source / MODEL_NAME / "config.pbtxt").is_file() and not (source / MANIFEST_FILE).is_file():
        if options not in (None, ServingOptions()):
            raise InputError(
                f"{source} is a model repository with its own options in config.pbtxt: leave out those for engine, "
                "precision, streams, long texts and batches"
            )
        yield source
        return
    options = options or ServingOptions()
    # Options that nothing fits fail here, not in Triton's log.
    choose(read_manifest(source), options.engine, options.precision)
    workspace = Workspace()
    try:
        write_temporary_repository(source, workspace.folder, options)
        yield workspace.folder
    finally:
        workspace.close()


@contextlib.contextmanager
def _signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Turn the first and second signal to stop into events: an exception anywhere could lose a process just started.

    A handler must not set the events itself, because it may interrupt the very thread that holds their lock. It puts
    the signal into a queue, which is reentrant, for another thread. `sigwait` in that thread would miss signals: numpy
    has already started threads that do not block them.
    """
    first, second = threading.Event(), threading.Event()
    received: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def set_events() -> None:
        while received.get() is not None:
            (second if first.is_set() else first).set()

    thread = threading.Thread(target=set_events, name="mirror-signals", daemon=True)
    thread.start()
    try:
        with stop_signals_handled(lambda number, _: received.put(number)):
            yield first, second
    finally:
        received.put(None)
        thread.join()
