"""The gateway as a process: it listens, and stops without losing a request."""

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
from mirror_runtime.gateway.backends import Backend
from mirror_runtime.gateway.metrics import Metrics
from mirror_runtime.gateway.service import Service
from mirror_runtime.gateway.settings import Settings

KEEP_ALIVE_S = 75
"""Longer than load balancers keep an idle connection: it is they who close it then, and no request meets its end."""

_BACKLOG = 2048
_ON_ITS_WAY_S = 0.2
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def listen(host: str, port: int) -> socket.socket:
    """Take a port.

    Args:
        host: address or name.
        port: 0 takes a free one.

    Raises:
        InputError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # Connections that linger from an earlier gateway do not count; one that listens does.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"port {port} on {host} cannot be used: {error.strerror}. Stop what listens there, or choose another with "
            "--port (0 picks a free one)"
        ) from error
    return listener


def run(backend: Backend, settings: Settings, listener: socket.socket, *, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, answer what is under way, and close the backend.

    Args:
        backend: who computes.
        settings: the operator's.
        listener: a socket that listens.
        say: takes lines for the operator.

    Raises:
        InputError: the settings do not fit the encoder.
    """
    service = Service(backend, settings, Metrics())
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    card = backend.card
    say(f"serving {settings.model!r} ({card.engine} {card.precision}, {card.backend}); Ctrl-C stops it")
    say(f"OpenAI   {url}/v1")
    say(f"TEI      {url}/embed")
    say(f"more     {url}/docs, /info, /health, /metrics")
    if host not in _LOOPBACK and not settings.keys:
        say(f"no API key is set: whoever reaches {host}:{port} is served")
    with _signals_handled():
        Server(service).run([listener])
    say(f"stopped; {service.metrics.total()} requests answered")


class Server(uvicorn.Server):
    """uvicorn, with a time between the signal and the closing of the port.

    Args:
        service: the gateway.
    """

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                loop="asyncio",  # uvloop, where it is installed, was no faster here
                http="httptools",
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,  # the metrics count; a proxy in front has the addresses
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(service.settings.timeout_s) + 1,
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Turn clients away gently first: health says no, and answers close their connections."""
        if self._service.draining:  # the second signal: whoever sends it does not want to wait
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        loop = asyncio.get_running_loop()
        # From a signal's handler, which interrupts the loop anywhere.
        loop.call_soon_threadsafe(loop.call_later, self._service.settings.drain_s, super().handle_exit, sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, and only then the connections: a request may be on its way on one that looks idle."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(_ON_ITS_WAY_S)
        await super().shutdown(sockets)


@contextmanager
def _signals_handled() -> Iterator[None]:
    """Let the process end by itself: uvicorn raises the signal that stopped it once more when all is done."""
    before = {sig: signal.signal(sig, lambda _sig, _frame: None) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
