"""The gateway as a process: it listens, serves, and stops without losing a request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import cast

import uvicorn

from mirror_runtime.errors import InputError
from mirror_runtime.gateway.app import make_app
from mirror_runtime.gateway.backends import EncodingBackend
from mirror_runtime.gateway.connections import Connection, Connections
from mirror_runtime.gateway.metrics import GatewayMetrics
from mirror_runtime.gateway.service import GatewayService
from mirror_runtime.gateway.settings import GatewaySettings, is_loopback
from mirror_runtime.repeats import RepeatFilter, limit_repeats
from mirror_runtime.serving_process import allow_open_files, stop_signals_handled

_BACKLOG = 2048
_ACCEPTS = 4
"""Connections accepted at once. asyncio takes as many as the backlog before it closes one that is too many."""

VECTOR_PATHS = (("OpenAI", "/v1"), ("TEI", "/embed"))
RERANK_PATHS = (("Cohere", "/v2/rerank"), ("TEI", "/rerank"))
"""What clients of each API call, for the operator."""

_LAST_REQUESTS_S = 0.2

_FILES = 48
"""Descriptors besides those of connections: libraries, the bundle, the log, a model server's connection."""

_FEWEST_CONNECTIONS = 8


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 picks a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # Accept a port with lingering connections of an earlier gateway, but not one that is listened on.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"port {port} on {host} cannot be used: {error.strerror}. Stop the process that listens there, or choose "
            "another port with --port (0 picks a free one)"
        ) from error
    return listener


def run(
    backend: EncodingBackend,
    settings: GatewaySettings,
    listener: socket.socket,
    *,
    on_progress: Callable[[str], None],
    twins: Sequence[EncodingBackend] = (),
) -> None:
    """Serve until SIGTERM, SIGHUP, SIGQUIT or Ctrl-C, then answer the requests under way and close the backends."""
    connections = possible_connections(settings.max_connections)
    if connections < settings.max_connections:
        on_progress(f"few file descriptors: at most {connections} connections; raise ulimit -n to have more")
        settings = replace(
            settings,
            max_connections=connections,
            max_peer_connections=min(settings.max_peer_connections, connections),
        )
    service = GatewayService(backend, settings, GatewayMetrics(), *twins)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    card = backend.card

    def announce() -> None:
        on_progress(f"serving {settings.model!r} ({card.engine} {card.precision}, {card.backend}); Ctrl-C stops it")
        for api, path in RERANK_PATHS if card.scores_pairs else VECTOR_PATHS:
            on_progress(f"{api:8} {url}{path}")
        on_progress(f"more     {url}/docs, /info, /health, /metrics")
        if not is_loopback(host) and not settings.keys:
            on_progress(f"no API key is set: anyone who reaches {host}:{port} is served")

    repeats = limit_repeats()
    server = GatewayServer(service, on_started=announce, repeats=repeats)
    try:
        with stop_signals_handled(server.handle_exit):  # also while it starts and after it has stopped
            server.run([listener])
    finally:
        repeats.summarize(now=True)
    on_progress(f"stopped; {service.metrics.answered} requests answered")


def possible_connections(wanted: int) -> int:
    """Raise this process's limit on file descriptors as far as needed, and return how many connections it allows.

    Raises:
        InputError: they are too few to serve anybody.
    """
    files = allow_open_files(wanted + _FILES)
    if files - _FILES < _FEWEST_CONNECTIONS:
        raise InputError(
            f"this process may open {files} files, and a gateway needs at least {_FILES + _FEWEST_CONNECTIONS}: raise "
            "the limit (ulimit -n 2048)"
        )
    return min(wanted, files - _FILES)


class GatewayServer(uvicorn.Server):
    """uvicorn, with a drain time between the signal and the closing of the port."""

    def __init__(
        self,
        service: GatewayService,
        *,
        on_started: Callable[[], None] = lambda: None,
        repeats: RepeatFilter | None = None,
    ) -> None:
        connections = Connections(service.settings, service.metrics)
        super().__init__(
            uvicorn.Config(
                make_app(service),
                backlog=_ACCEPTS,
                loop="asyncio",  # uvloop, where it is installed, was no faster here
                http=cast(type[asyncio.Protocol], partial(Connection, connections)),
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,  # the metrics count requests; a proxy in front logs addresses
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(service.settings.timeout_s) + 1,
            )
        )
        self._service = service
        self._on_started = on_started
        self._repeats = repeats

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and then announce the addresses: from here on, signals are obeyed."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)
        self._on_started()

    async def on_tick(self, counter: int) -> bool:
        """Log what was repeated."""
        if self._repeats is not None:
            self._repeats.summarize()
        return await super().on_tick(counter)

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Leave the signals to `run`."""
        return nullcontext()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining: health checks fail and responses close their connections.

        A second signal, of whichever kind, ends the requests under way and all waiting.
        """
        if self._service.draining or not self.started:
            self.force_exit = self._service.draining or self.should_exit
            self.should_exit = True
            if self.force_exit:
                with suppress(RuntimeError):  # the loop has ended
                    asyncio.get_running_loop().call_soon_threadsafe(self._drop_connections)
            return
        self._service.draining = True
        loop = asyncio.get_running_loop()
        # A signal handler interrupts the loop anywhere, so it may only call threadsafe methods.
        loop.call_soon_threadsafe(loop.call_later, self._service.settings.drain_s, super().handle_exit, sig, frame)

    def _drop_connections(self) -> None:
        for connection in list(self.server_state.connections):
            cast(Connection, connection).drop("stopped")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port first and the connections later: a request may be on its way on an idle one."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(_LAST_REQUESTS_S)
        await super().shutdown(sockets)
