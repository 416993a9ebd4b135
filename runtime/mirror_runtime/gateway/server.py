"""The gateway as a process: it listens, serves, and stops without losing a request."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from mirror_runtime.errors import InputError
from mirror_runtime.gateway.app import make_app
from mirror_runtime.gateway.backends import EncodingBackend
from mirror_runtime.gateway.metrics import GatewayMetrics
from mirror_runtime.gateway.service import GatewayService
from mirror_runtime.gateway.settings import GatewaySettings

KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections, so that they close them and no request meets a closing one."""

_BACKLOG = 2048
_LAST_REQUESTS_S = 0.2
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


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
) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer the requests under way and close the backend."""
    service = GatewayService(backend, settings, GatewayMetrics())
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    card = backend.card
    on_progress(f"serving {settings.model!r} ({card.engine} {card.precision}, {card.backend}); Ctrl-C stops it")
    on_progress(f"OpenAI   {url}/v1")
    on_progress(f"TEI      {url}/embed")
    on_progress(f"more     {url}/docs, /info, /health, /metrics")
    if host not in _LOOPBACK and not settings.keys:
        on_progress(f"no API key is set: anyone who reaches {host}:{port} is served")
    with _signals_handled():
        GatewayServer(service).run([listener])
    on_progress(f"stopped; {service.metrics.answered} requests answered")


class GatewayServer(uvicorn.Server):
    """uvicorn, with a drain time between the signal and the closing of the port."""

    def __init__(self, service: GatewayService) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                loop="asyncio",  # uvloop, where it is installed, was no faster here
                http="httptools",
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,  # the metrics count requests; a proxy in front logs addresses
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(service.settings.timeout_s) + 1,
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining: health checks fail and responses close their connections. A second signal stops at once."""
        if self._service.draining:
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        loop = asyncio.get_running_loop()
        # A signal handler interrupts the loop anywhere, so it may only call threadsafe methods.
        loop.call_soon_threadsafe(loop.call_later, self._service.settings.drain_s, super().handle_exit, sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port first and the connections later: a request may be on its way on an idle one."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(_LAST_REQUESTS_S)
        await super().shutdown(sockets)


@contextmanager
def _signals_handled() -> Iterator[None]:
    """Ignore the signal that uvicorn raises again after its shutdown, so that the process exits with status 0."""
    before = {sig: signal.signal(sig, lambda _sig, _frame: None) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
