"""The middleware that every request passes: API key, body limit, request id, counters."""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Collection, Mapping

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mirror_runtime.gateway.errors import Refusal
from mirror_runtime.gateway.service import REQUEST_ID, GatewayService

CLIENT_GONE = 499
"""The status that a request is counted under when its client did not wait for the answer."""

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
        self._max_body_bytes = service.settings.max_body_bytes

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

        def count() -> None:
            nonlocal counted
            if not counted:
                counted = True
                route = path if path in self._routes else "other"
                self._service.metrics.count(route, status, time.perf_counter() - began)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                count()  # before the last byte, so that a client with an answer finds it counted
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                if self._service.draining:  # so that clients connect elsewhere before the port closes
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            refusal = self._refusal(path, headers)
            if refusal is None:
                await self._app(scope, self._limited(receive), answer)
            else:
                await response_of(refusal)(scope, receive, answer)
        finally:
            count()

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> Refusal | None:
        """Check a request's key and stated length, before its body is read."""
        if self._keys and path not in self._open:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Compare all keys, each in constant time, so that the time taken reveals nothing.
            matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
            if scheme.lower() != b"bearer" or not any(matches):
                return Refusal(401, "invalid_api_key", "send a valid key: Authorization: Bearer KEY")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Wrap `receive` so that it fails when a body exceeds the limit, whatever its headers say."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self._max_body_bytes:
                    # The only kind of exception that FastAPI lets through while it reads a body.
                    raise HTTPException(413, self._too_large().message)
            return message

        return limited

    def _too_large(self) -> Refusal:
        message = f"the body has more than {self._max_body_bytes} bytes: send fewer texts per request"
        return Refusal(413, "body_too_large", message)


def response_of(refusal: Refusal) -> Response:
    """Build the HTTP response of a refusal."""
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")
