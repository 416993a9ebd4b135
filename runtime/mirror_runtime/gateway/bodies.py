"""Read JSON bodies. Parsing holds Python's lock, so a body that cannot be a request is refused before it."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from mirror_runtime.gateway.errors import Refusal, client_gone

_SHORT = 65_536
"""Bytes of a body that is parsed in the event loop: in 20 ms at worst (21,000 empty lists, 2026-11-30)."""

_FIELDS = 32
"""Strings of a request besides its texts: names of its fields and their values."""

_BYTES_PER_TEXT = 16
"""Bytes outside of strings for each possible text: a comma, and what an odd client writes."""


def json_route(max_texts: int, max_bytes: int) -> type[APIRoute]:
    """Build the class of routes whose JSON bodies hold at most `max_texts` texts, in `max_bytes` once decompressed."""
    turn = asyncio.Lock()  # one at a time, so that other tasks run between two of them

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            if self.body_field is None:
                return handle

            async def read_and_handle(request: Request) -> Response:
                try:
                    body = await request.body()
                except ClientDisconnect:
                    raise client_gone() from None
                coding = request.headers.get("content-encoding", "").strip().lower()
                if coding not in ("", "identity", "gzip"):
                    raise Refusal(415, "encoding_not_supported", "Content-Encoding must be gzip, or absent")
                if coding == "gzip":
                    async with turn:
                        body = await asyncio.to_thread(_decompressed, body, max_bytes)
                        request.state.held.add(len(body))
                if body and "json" in request.headers.get("content-type", "").lower():
                    if len(body) <= _SHORT:
                        request._json = _parsed(body)
                    else:
                        async with turn:
                            request._json = await asyncio.to_thread(_parsed_if_plain, body, max_texts)
                return await handle(request)  # FastAPI takes the parsed body from the request

            return read_and_handle

    return JsonRoute


def _decompressed(body: bytes, max_bytes: int) -> bytes:
    """Decompress a body, up to the limit: 4 kB can become 4 MB."""
    try:
        decoder = zlib.decompressobj(31)
        content = decoder.decompress(body, max_bytes + 1)
    except zlib.error:
        raise Refusal(400, "invalid_body", "the body is not gzip, as its Content-Encoding says") from None
    if len(content) > max_bytes:
        raise Refusal(413, "body_too_large", f"the body has more than {max_bytes} bytes: send fewer texts per request")
    if not decoder.eof:
        raise Refusal(400, "invalid_body", "the gzip body is not whole")
    return content


def _parsed_if_plain(body: bytes, max_texts: int) -> Any:
    """Parse a large body, which must be a few strings: 4 MB of empty lists or fields took 0.7 to 1.6 s to parse."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = plain.count(b'"') // 2
    if strings <= max_texts + _FIELDS:
        outside = b"".join(plain.split(b'"')[::2]).translate(None, b" \t\r\n")
        if len(outside) <= (max_texts + _FIELDS) * _BYTES_PER_TEXT:
            return _parsed(body)
        strings = len(outside)
    raise Refusal(
        413,
        "body_too_complex",
        f"the body holds {strings} values or more: a request has at most {max_texts} texts, and no token ids",
    )


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8-sig"))  # of bytes, it would take UTF-16 too, whose quotes go uncounted
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it is not UTF-8, or nested too deeply")
        raise Refusal(400, "invalid_json", f"the body is not JSON: {reason}") from None
