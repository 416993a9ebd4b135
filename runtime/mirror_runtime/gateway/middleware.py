"""What every request passes on its way in and out: key, body limit, request id, counters."""

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
from mirror_runtime.gateway.service import REQUEST_ID, Service

CLIENT_GONE = 499
"""What a request is counted as whose client did not wait for the answer."""

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Middleware:
    """An ASGI application around another one.

    Args:
        app: the routes.
        service: the gateway behind them.
        routes: paths that exist, which is what requests are counted by.
        open_routes: of them, those that want no key.
    """

    def __init__(
        self, app: ASGIApp, service: Service, *, routes: Collection[str], open_routes: Collection[str]
    ) -> None:
        self._app = app
        self._service = service
        self._routes = frozenset(routes)
        self._open = frozenset(open_routes)
        self._keys = tuple(key.encode("ascii") for key in service.settings.keys)
        self._most = service.settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or what the server says of itself."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        identity = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode("ascii")
        REQUEST_ID.set(identity.decode("ascii"))
        path = scope["path"]
        status = CLIENT_GONE
        done = False

        def count() -> None:
            nonlocal done
            if not done:
                done = True
                route = path if path in self._routes else "other"
                self._service.metrics.answered(route, status, time.perf_counter() - began)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                count()  # before the last byte: whoever has an answer finds it counted
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                if self._service.draining:  # so that clients turn to others before the port closes
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            refusal = self._refusal(path, headers)
            if refusal is None:
                await self._app(scope, self._counted(receive), answer)
            else:
                await response_of(refusal)(scope, receive, answer)
        finally:
            count()

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> Refusal | None:
        """Say why a request is refused before its body is read; None where it is not."""
        if self._keys and path not in self._open:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Every key is compared, and each in constant time: the time taken says nothing of any.
            known = [hmac.compare_digest(key.strip(), one) for one in self._keys]
            if scheme.lower() != b"bearer" or not any(known):
                return Refusal(401, "invalid_api_key", "send a key that is known: Authorization: Bearer KEY")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            return self._too_large()
        return None

    def _counted(self, receive: Receive) -> Receive:
        """Read a body up to the limit, whatever its headers say."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self._most:
                    # FastAPI lets this one kind of exception through while it reads a body.
                    raise HTTPException(413, self._too_large().message)
            return message

        return counted

    def _too_large(self) -> Refusal:
        return Refusal(413, "body_too_large", f"the body has more than {self._most} bytes: send fewer texts a request")


def response_of(refusal: Refusal) -> Response:
    """Give a refusal as HTTP."""
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")
