"""The middleware that every request passes: host, API key, body limit, buffers, request id, counters."""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Collection, Iterator, Mapping

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mirror_runtime.gateway.buffers import FREE_BYTES, Buffers, HeldBytes
from mirror_runtime.gateway.errors import CLIENT_GONE, Refusal
from mirror_runtime.gateway.peers import peer_of
from mirror_runtime.gateway.service import REQUEST_ID, GatewayService

_WRITE_BYTES = 65_536
"""Bytes of an answer that are passed to the socket at once: a slow reader holds one answer, and not a copy of it."""

_PORT = re.compile(rb":\d+$")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Middleware:
    """An ASGI application around another one.

    Requests to paths that are not in `routes` are counted as "other"; those in `open_routes` need no key.
    """

    def __init__(
        self, app: ASGIApp, service: GatewayService, *, routes: Collection[str], open_routes: Collection[str]
    ) -> None:
        self._app = app
        self._service = service
        self._routes = frozenset(routes)
        self._open = frozenset(open_routes)
        self._keys = tuple(key.encode("ascii") for key in service.settings.keys)
        self._hosts = frozenset(name.encode() for name in service.settings.allowed_hosts)
        self._max_body_bytes = service.settings.max_body_bytes
        # Most bodies just over 64 kB have a few hundred texts: an eighth of 2,048 are texts of 256 bytes. Room for as
        # many as a request may have would rarely be there. The texts themselves are counted once they are parsed.
        self._likely_texts = max(1, service.settings.max_batch // 8)
        self._buffers = Buffers(service.settings.max_buffered_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or pass a lifespan event on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex.encode("ascii")
        REQUEST_ID.set(request_id.decode("ascii"))
        path = scope["path"]
        status = CLIENT_GONE
        counted = False
        key = self._key(headers)
        held = scope.setdefault("state", {})["held"] = self._buffers.hold(_caller(scope, key))

        def count() -> None:
            nonlocal counted
            if not counted:
                counted = True
                route = path if path in self._routes else "other"
                self._service.metrics.count(route, status, time.perf_counter() - began)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                if self._service.draining:  # so that clients connect elsewhere before the port closes
                    message["headers"].append((b"connection", b"close"))
                await send(message)
                return
            for piece in _pieces(message):
                if not piece["more_body"]:
                    count()  # before the last byte, so that a client with an answer finds it counted
                await send(piece)

        try:
            refusal = self._refusal(path, headers, key)
            if refusal is None:
                await self._app(scope, self._limited(receive, held), answer)
            else:
                await response_of(refusal)(scope, receive, answer)
        finally:
            held.release()
            count()

    def _key(self, headers: Mapping[bytes, bytes]) -> int | None:
        """Return the position of a request's key among the known ones; None if it has none of them."""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Compare all keys, each in constant time, so that the time taken reveals nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return matches.index(True) if scheme.lower() == b"bearer" and any(matches) else None

    def _refusal(self, path: str, headers: Mapping[bytes, bytes], key: int | None) -> Refusal | None:
        """Check a request's host, key and stated length, before its body is read."""
        if self._hosts and _PORT.sub(b"", headers.get(b"host", b"").lower()) not in self._hosts:
            return Refusal(421, "host_not_allowed", "this name of the gateway is not allowed: see --allowed-host")
        if self._keys and path not in self._open and key is None:
            return Refusal(401, "invalid_api_key", "send a valid key: Authorization: Bearer KEY")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _limited(self, receive: Receive, held: HeldBytes) -> Receive:
        """Wrap `receive` so that it fails when a body exceeds the bounds, whatever its headers say."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self._max_body_bytes:
                    raise self._too_large()
                if size > FREE_BYTES >= size - len(message.get("body", b"")):
                    self._service.scheduler.check_room_for_large(self._likely_texts, held.caller)
                held.add(len(message.get("body", b"")))
            return message

        return limited

    def _too_large(self) -> Refusal:
        message = f"the body has more than {self._max_body_bytes} bytes: send fewer texts per request"
        return Refusal(413, "body_too_large", message)


def _caller(scope: Scope, key: int | None) -> str:
    """Return whose part of the gateway a request takes: its key's, or else its address's."""
    return f"key {key}" if key is not None else peer_of(scope.get("client"))


def _pieces(message: Message) -> Iterator[Message]:
    """Split a part of an answer. uvicorn waits between pieces while the client does not read.

    Pieces are copies: from Python 3.12 on, a transport keeps what it has not sent, and a view keeps the whole answer.
    """
    body, more = memoryview(message.get("body", b"")), message.get("more_body", False)
    while len(body) > _WRITE_BYTES:
        yield {"type": message["type"], "body": bytes(body[:_WRITE_BYTES]), "more_body": True}
        body = body[_WRITE_BYTES:]
    yield {"type": message["type"], "body": bytes(body), "more_body": more}


def response_of(refusal: Refusal) -> Response:
    """Build the HTTP response of a refusal."""
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")
