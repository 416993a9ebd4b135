"""HTTP connections with bounds in bytes, numbers and time, which uvicorn's parser of HTTP/1.1 does not have.

    HEAD ──▶ BODY ──▶ WORK ──▶ ANSWER ──▶ IDLE ──▶ HEAD …

Each phase but WORK has a time limit. A client gets a refusal where its connection can still carry one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mirror_runtime.gateway.errors import Refusal, unavailable
from mirror_runtime.gateway.metrics import GatewayMetrics
from mirror_runtime.gateway.peers import peer_of
from mirror_runtime.gateway.settings import GatewaySettings

_LINGER_S = 1.0
"""How long a refused client may go on sending: closing at once would reset the connection before it reads why."""

_STOP_S = 1.0
"""How long a stopping gateway waits for half-sent requests and unread answers."""

_MAX_PIPELINED = 16
"""Requests that wait behind the first of their connection; 256 kB hold 12,000."""

_MAX_PIPELINED_BYTES = 65_536
"""Bytes of their bodies that are read, besides those of one read."""

_BYTES_PER_CHUNKED_BYTE = 8
"""Of a body of chunks of one byte, 6 bytes each."""


class Phase(Enum):
    """What a connection waits for. All but WORK wait for the client."""

    HEAD = "head"
    BODY = "body"
    WORK = "work"
    ANSWER = "answer"
    IDLE = "idle"
    CLOSING = "closing"


class Connections:
    """The open connections of a gateway."""

    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self.settings = settings
        self.seconds: Mapping[Phase, float] = {
            Phase.HEAD: settings.header_s,
            Phase.BODY: settings.body_s,
            Phase.ANSWER: settings.answer_s,
            Phase.IDLE: settings.idle_s,
            Phase.CLOSING: settings.answer_s,
        }
        self._metrics = metrics
        self._open: set[Connection] = set()
        self._peers: Counter[str] = Counter()

    def add(self, connection: Connection) -> bool:
        """Count a connection, and close another one for it if there are too many. Return false if none can be."""
        full: Iterable[Connection] = ()
        if self._peers[connection.peer] >= self.settings.max_peer_connections:
            full = [other for other in self._open if other.peer == connection.peer]
        elif len(self._open) >= self.settings.max_connections:
            full = self._open
        waiting = [other for other in full if other.phase is not Phase.WORK]
        if full and not waiting:
            return False
        if waiting:  # clients that have had an answer are the last to lose their connection
            first = min(waiting, key=lambda other: (other.phase is not Phase.CLOSING, other.answers > 0, other.since))
            first.drop("evicted")
        self._open.add(connection)
        self._count(connection, 1)
        return True

    def remove(self, connection: Connection) -> None:
        """Stop counting a connection."""
        if connection in self._open:
            self._open.remove(connection)
            self._count(connection, -1)

    def _count(self, connection: Connection, change: int) -> None:
        self._peers[connection.peer] += change
        if not self._peers[connection.peer]:
            del self._peers[connection.peer]
        self._metrics.connections.set(len(self._open))

    def count_dropped(self, reason: str) -> None:
        """Count a connection that the gateway ended."""
        self._metrics.dropped.labels(reason).inc()


class Connection(HttpToolsProtocol):
    """One connection: uvicorn's, with bounds.

    Attributes:
        peer: the client's address, see `peer_of`.
        phase: what it waits for.
        since: when that began, on the event loop's clock.
        answers: requests answered so far.
    """

    def __init__(self, connections: Connections, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self._all = connections
        self._timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None  # the request that is worked on, the first of the pipeline
        self._in_head = self._in_body = self._progressed = False
        self._head_bytes = self._body_bytes = self._fields = 0
        self._excess = 0  # bytes received since the parser last completed a head or a message, but for its body
        self.phase, self.since, self.answers, self.peer = Phase.IDLE, 0.0, 0, ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, or refuse it."""
        super().connection_made(transport)
        self.peer = peer_of(self.client)
        self._enter(Phase.HEAD)
        if not self._all.add(self):
            self._refuse(unavailable("too_many_connections", "the gateway has too many connections: try again later"))
            self.transport.close()  # not counted, so it must not linger

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting, and working: uvicorn tells only the last request of a pipeline that its client has left."""
        self._all.remove(self)
        self._arm(None)
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, and refuse what exceeds the bounds."""
        if self.phase is Phase.CLOSING:
            return  # read, so that the client can read why it was refused
        self._progressed, self._body_bytes = False, 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._continue_without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            refusal = error.__context__
            if not isinstance(refusal, Refusal):
                refusal = Refusal(400, "invalid_http", "this is not a request in HTTP/1.1")
            self._refuse(refusal)
            return
        # A line without an end and chunks' extensions grow without a callback.
        excess = self._excess + len(data) - _BYTES_PER_CHUNKED_BYTE * self._body_bytes
        self._excess = 0 if self._progressed else max(0, excess)
        if self._excess > self._all.settings.max_header_bytes:
            self._refuse(_head_too_large(self._all.settings))
        self._settle()

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._in_head, self._head_bytes, self._fields = True, 0, 0

    def on_url(self, url: bytes) -> None:
        """Count a part of the address."""
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header or trailer."""
        limits = self._all.settings
        self._fields += 1
        self._head_bytes += len(name) + len(value)
        if self._fields > limits.max_headers or self._head_bytes > limits.max_header_bytes:
            raise _head_too_large(limits)
        if self._in_head:  # trailers mean nothing here
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a body, and the work."""
        if self.parser.should_upgrade():
            return  # see `_continue_without_upgrade`
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise Refusal(429, "too_many_pipelined", f"more than {_MAX_PIPELINED} requests wait on one connection")
        super().on_headers_complete()  # raises if it cannot parse the address
        if 2 * len(self.pipeline) < _MAX_PIPELINED and self._pipelined_bytes() <= _MAX_PIPELINED_BYTES:
            self.flow.resume_reading()  # else nothing would tell that the client has left
        self._in_head, self._in_body, self._progressed = False, True, True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Begin the work for a request."""
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Count a part of a body."""
        self._body_bytes += len(body)
        super().on_body(body)
        if self._pipelined_bytes() > _MAX_PIPELINED_BYTES:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        """End a body."""
        if not self._in_head:
            self._in_body, self._progressed = False, True
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """End an answer. What the socket has not taken of it yet is at most 64 kB."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # its time begins anew with every byte
        self.answers += 1
        self._settle()

    def pause_writing(self) -> None:
        """Limit the time of an answer that the client does not read."""
        super().pause_writing()
        if self.phase is Phase.WORK:
            self._enter(Phase.ANSWER)

    def shutdown(self) -> None:
        """Close the connection, after its answer if its request is complete, else in a moment."""
        super().shutdown()
        self._settle()
        if self.phase not in (Phase.WORK, Phase.ANSWER):
            self._arm(_STOP_S)

    def drop(self, reason: str) -> None:
        """Close the connection at once, and forget what is unsent."""
        self._all.count_dropped(reason)
        self._all.remove(self)
        self.transport.abort()

    def _pipelined_bytes(self) -> int:
        return sum(len(cycle.body) for cycle, _ in self.pipeline)

    def _settle(self) -> None:
        """Enter the phase that follows from what has been received and sent."""
        working = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing() or self.phase is Phase.CLOSING:
            phase = Phase.CLOSING
        elif self._in_head or self._in_body:
            phase = Phase.HEAD if self._in_head else Phase.BODY
        elif working:
            phase = Phase.ANSWER if self.phase is Phase.ANSWER else Phase.WORK
        else:
            phase = Phase.IDLE if self.answers else Phase.HEAD
        if phase is not self.phase:
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self.phase, self.since = phase, self.loop.time()
        self._arm(self._all.seconds.get(phase))

    def _arm(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        """End a connection whose client did not go on in time."""
        if self._in_head or self._in_body:
            self._refuse(Refusal(408, "request_incomplete", "the rest of the request did not arrive in time"))
        else:
            self.drop(f"{self.phase.value} timeout")

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what is not a request, and close the connection; at once if an answer is under way on it."""
        cycle = self.cycle
        began = cycle is not None and not cycle.response_complete
        if (self.pipeline or self._in_head or cycle.response_started) if began else self._in_body:
            self.drop(refusal.code)
            return
        if began:  # its request is the one that is refused
            cycle.disconnected = True
            cycle.message_event.set()
        self._all.count_dropped(refusal.code)
        body = refusal.body()
        fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**fields, **refusal.headers}.items())
        head = f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n{lines}\r\n"
        self.transport.write(head.encode("ascii") + body)
        self.transport.write_eof()
        self._enter(Phase.CLOSING)
        self._arm(_LINGER_S)
        self._in_head = self._in_body = False

    def _continue_without_upgrade(self, rest: bytes) -> None:
        """Parse a request that proposes another protocol again, without that proposal, which may be ignored (RFC 9110).

        The parser stops at the end of its head, and takes the body for the other protocol's.
        """
        method = self.parser.get_method()
        self.parser = httptools.HttpRequestParser(self)
        if method == b"CONNECT":
            self._refuse(Refusal(405, "method_not_allowed", "this is not a proxy"))
            return
        fields = b"".join(b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade")
        self.data_received(b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, self.url, fields, rest))


def _head_too_large(limits: GatewaySettings) -> Refusal:
    bounds = f"{limits.max_header_bytes} bytes and {limits.max_headers} headers"
    return Refusal(431, "headers_too_large", f"the request's head is larger than {bounds}")
