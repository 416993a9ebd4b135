"""`mirror serve` as a service: start, watch, start again what broke, drain on SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import socket
import tempfile
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
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from mirror_runtime.triton.server.deploy_lock import ServerFile
from mirror_runtime.triton.server.health import HealthPolicy, Watchdog
from mirror_runtime.triton.server.server import Server

_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """How a service is kept alive and ended.

    Attributes:
        patience: how long a server may be silent before it is started again.
        max_restarts: how often a broken server is started again within `window_s`; then the service gives up.
        window_s: see `max_restarts`; in seconds.
        drain_s: how long accepted requests may take to be answered when the service ends, in seconds.
    """

    patience: HealthPolicy = field(default_factory=HealthPolicy)
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
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve a bundle or a model repository until SIGINT or SIGTERM arrives; then drain, stop and return.

    Call it from the main thread. A server or model that dies, hangs or fails every request is started again. At the
    signal new requests are refused as UNAVAILABLE (HTTP 503), accepted ones are answered; a second signal ends it at
    once.

    Args:
        source: the bundle's folder, or a model repository that holds the model `embed`, which `mirror deploy` can
            then replace while it serves.
        http_port: 0 picks a free one; so do the others.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.
        host: see `Server`.
        options: how a bundle is served. A repository says so itself.
        service: how the service is kept alive and ended.
        on_ready: called once with the server when a real inference has succeeded.
        say: called with a line for people whenever something happens.

    Raises:
        InputError: `source` is neither, or options are given for a repository, or it is served already.
        BundleError: `source` is no bundle.
        EngineError: the bundle has nothing that runs here as asked.
        MissingExtra: the server's wheel or tritonclient is not installed.
        ServerError: the server did not start, or broke more often than `max_restarts` allows.
    """
    service = service or ServiceOptions()
    with _repository(source, options) as repository, _signals() as signals, contextlib.ExitStack() as stack:
        announcement = None
        if repository == source:
            try:
                announcement = stack.enter_context(ServerFile(repository))
            except OSError as error:
                say(f"{repository} cannot be written ({error.strerror}): mirror deploy cannot reach this server")
        server = Server(repository, host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)
        keeper = Supervisor(server, service, signals.first, announcement, say)
        try:
            server.start()
            server.wait_ready(cancelled=signals.first)
            if not signals.first.is_set():
                if announcement:
                    announcement.write(server.access)
                if on_ready is not None:
                    on_ready(server)
                if keeper.keep():
                    _drain(server, service.drain_s, signals.second, say)
            server.stop(grace_s=1.0)
        finally:
            server.stop(grace_s=0.0)


class Supervisor:
    """Starts a server again whenever its watchdog says that it is broken, with pauses and up to a bound."""

    def __init__(
        self,
        server: Server,
        options: ServiceOptions,
        stopping: threading.Event,
        announcement: ServerFile | None,
        say: Callable[[str], None],
    ) -> None:
        self._server, self._options, self._stopping = server, options, stopping
        self._announcement, self._say = announcement, say
        self._restarts: deque[float] = deque()

    def keep(self) -> bool:
        """Return when `stopping` is set; says whether the server serves then.

        Raises:
            ServerError: the server broke once more than it may.
        """
        while True:
            with Watchdog(self._server, self._options.patience) as watchdog:
                problem = watchdog.watch(self._stopping)
            if not problem:
                return True
            broke_at = time.monotonic()
            while problem:
                problem = self._restart(problem)
                if self._stopping.is_set():
                    return False
            self._say(f"serving again after {time.monotonic() - broke_at:.1f} s")

    def _restart(self, problem: str) -> str:
        """Try once; gives what went wrong this time."""
        self._server.stop(grace_s=0.0)  # what hangs does not end by itself; clients see a closed connection at once
        now, most = time.monotonic(), self._options.max_restarts
        while self._restarts and now - self._restarts[0] > self._options.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= most:
            raise ServerError(
                f"gave up after {most} restarts within {self._options.window_s / 60:.0f} minutes; lastly: {problem}"
            )
        self._say(problem)
        pause_s = min(_LONGEST_PAUSE_S, 2.0 ** (len(self._restarts) - 1)) if self._restarts else 0.0
        self._restarts.append(now)
        when = f" in {pause_s:.0f} s" if pause_s else ""
        self._say(f"starting again{when}: {len(self._restarts)} of {most} restarts")
        if self._stopping.wait(pause_s):
            return ""
        try:
            self._server.start()
            self._server.wait_ready(cancelled=self._stopping)
        except ServerError as error:
            return str(error)
        if self._announcement:
            self._announcement.write(self._server.access)
        return ""


def _drain(server: Server, timeout_s: float, at_once: threading.Event, say: Callable[[str], None]) -> None:
    say("stopping: requests under way are answered, new ones refused; again to stop at once")
    try:
        if not server.drain(timeout_s, at_once):
            say("stopped before every request was answered")
    except ServerError as error:
        say(f"not drained: {error}")


@contextlib.contextmanager
def _repository(source: Path, options: ServingOptions | None) -> Iterator[Path]:
    """Give the model repository to serve: the source itself, or one that refers to the bundle."""
    if (source / MODEL_NAME / "config.pbtxt").is_file() and not (source / MANIFEST_FILE).is_file():
        if options not in (None, ServingOptions()):
            raise InputError(
                f"{source} is a model repository, whose config.pbtxt says how it is served: leave out the options for "
                "engine, precision, streams, long texts and batches"
            )
        yield source
        return
    options = options or ServingOptions()
    # An impossible wish ends here, not in Triton's log.
    choose(read_manifest(source), options.engine, options.precision)
    with tempfile.TemporaryDirectory(prefix="mirror-repository-") as folder:
        write_temporary_repository(source, Path(folder), options)
        yield Path(folder)


@dataclass(frozen=True)
class _Signals:
    first: threading.Event
    second: threading.Event


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    """Turn SIGINT and SIGTERM into events: an exception at an arbitrary place could lose a process just started.

    A handler must not set the events itself: it may interrupt the very thread that holds their lock. So the signals'
    numbers go through a socket to a thread.
    """
    events = _Signals(threading.Event(), threading.Event())
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def note() -> None:
        while number := reader.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                (events.second if events.first.is_set() else events.first).set()

    thread = threading.Thread(target=note, name="mirror-signals", daemon=True)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield events
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()
