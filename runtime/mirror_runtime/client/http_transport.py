"""Requests to Triton over HTTP: tritonclient encodes and parses the bodies, the standard library or aiohttp sends them.

tritonclient's own HTTP client sleeps 10 ms in every `async_infer`, works in one thread only, and leaves a gevent hub
with threads and file descriptors behind.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from numpy.typing import NDArray

from mirror_runtime.client.protocol import (
    OUTPUTS,
    Parameters,
    Reply,
    microseconds,
    read_reply,
    server_error,
    text_tensor,
    unreachable,
)
from mirror_runtime.errors import DeadlineExceededError, ServerError
from mirror_runtime.extras import require

BODY_BYTES = 1_000_000
"""Triton 2.51, the version in the pytriton wheel, crashes on HTTP bodies of about 4 MB; 2 MB passed in a test."""

_JSON_LENGTH = "Inference-Header-Content-Length"


class HttpTransport:
    """Requests over up to `in_flight` connections, kept open between requests."""

    body_bytes = BODY_BYTES

    def __init__(self, url: str, model: str, timeout_s: float, in_flight: int) -> None:
        library = require("tritonclient.http", "client")
        self._library = library
        self._url, self._timeout_s = url, timeout_s
        self._path = f"/v2/models/{quote(model, safe='')}"
        self._outputs = [library.InferRequestedOutput(name, binary_data=True) for name in OUTPUTS]
        self._idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="mirror-http")

    def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Callable[[], Reply]:
        """Send texts without waiting."""
        body, headers = _request(self._library, texts, parameters, self._outputs, timeout_s)
        give_up_at = time.monotonic() + timeout_s
        future = self._pool.submit(self._exchange, "POST", f"{self._path}/infer", body, headers, give_up_at)

        def wait() -> Reply:
            return _reply(self._library, *future.result())

        return wait

    def config(self) -> Mapping[str, Any]:
        """Fetch the model's configuration."""
        return self._get("config")

    def statistics(self) -> Mapping[str, Any]:
        """Fetch the model's counters."""
        statistics: Mapping[str, Any] = self._get("stats")["model_stats"][0]
        return statistics

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()

    def _get(self, action: str) -> Mapping[str, Any]:
        body, _ = self._exchange("GET", f"{self._path}/{action}", None, {}, time.monotonic() + self._timeout_s)
        reply: Mapping[str, Any] = json.loads(body)
        return reply

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], give_up_at: float
    ) -> tuple[bytes, str | None]:
        """Send one request; return the reply's body and the length of its JSON part, None if not stated."""
        try:
            connection, reused = self._idle.get_nowait(), True
        except queue.Empty:
            connection, reused = self._connect(), False
        try:
            try:
                response = _round_trip(connection, method, path, body, headers, give_up_at)
            except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
                if not reused:
                    raise
                # The server closed the idle connection. A request may safely be sent twice.
                connection.close()
                response = _round_trip(connection, method, path, body, headers, give_up_at)
            content = response.read()
        except TimeoutError as error:
            connection.close()
            raise DeadlineExceededError(f"{self._url} did not answer in time") from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise unreachable(self._url, str(error) or type(error).__name__) from error
        self._idle.put(connection)
        if response.status != 200:
            raise server_error(self._url, f"HTTP {response.status}", _message(content))
        return content, response.getheader(_JSON_LENGTH)

    def _connect(self) -> http.client.HTTPConnection:
        try:
            return http.client.HTTPConnection(self._url, timeout=self._timeout_s)
        except http.client.InvalidURL as error:
            raise ServerError(f"{self._url} is not host:port: {error}") from error


class AsyncHttpTransport:
    """`HttpTransport` of one event loop. Cancelling the waiting task cancels the request."""

    body_bytes = BODY_BYTES

    def __init__(self, url: str, model: str) -> None:
        aiohttp = require("aiohttp", "client")
        library = require("tritonclient.http", "client")
        self._library, self._aiohttp, self._url = library, aiohttp, url
        self._path = f"http://{url}/v2/models/{quote(model, safe='')}"
        # One connection per request under way: the caller limits those.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._outputs = [library.InferRequestedOutput(name, binary_data=True) for name in OUTPUTS]

    async def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Reply:
        """Send texts and wait for the reply."""
        body, headers = _request(self._library, texts, parameters, self._outputs, timeout_s)
        return _reply(self._library, *await self._exchange("POST", "infer", body, headers, timeout_s))

    async def config(self, timeout_s: float) -> Mapping[str, Any]:
        """Fetch the model's configuration."""
        content, _ = await self._exchange("GET", "config", None, {}, timeout_s)
        config: Mapping[str, Any] = json.loads(content)
        return config

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _exchange(
        self, method: str, action: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[bytes, str | None]:
        timeout = self._aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, f"{self._path}/{action}", data=body, headers=headers, timeout=timeout
            ) as response:
                content = await response.read()
        except asyncio.TimeoutError as error:
            raise DeadlineExceededError(f"{self._url} did not answer in time") from error
        except self._aiohttp.ClientError as error:
            raise unreachable(self._url, str(error) or type(error).__name__) from error
        if response.status != 200:
            raise server_error(self._url, f"HTTP {response.status}", _message(content))
        return content, response.headers.get(_JSON_LENGTH)


def _round_trip(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
    give_up_at: float,
) -> http.client.HTTPResponse:
    connection.timeout = give_up_at - time.monotonic()
    if connection.timeout <= 0:
        raise TimeoutError
    if connection.sock is not None:
        connection.sock.settimeout(connection.timeout)
    connection.request(method, path, body, dict(headers))
    return connection.getresponse()


def _request(
    library: Any, texts: NDArray[Any], parameters: Parameters, outputs: Sequence[Any], timeout_s: float
) -> tuple[bytes, dict[str, str]]:
    """Encode a request's body and headers with tritonclient.http."""
    body, json_length = library.InferenceServerClient.generate_request_body(
        [text_tensor(library, texts)], outputs=outputs, timeout=microseconds(timeout_s), parameters=dict(parameters)
    )
    headers = {"Content-Type": "application/octet-stream"}
    if json_length is not None:
        headers[_JSON_LENGTH] = str(json_length)
    return body, headers


def _reply(library: Any, body: bytes, json_length: str | None) -> Reply:
    """Parse a reply's body with tritonclient.http."""
    length = None if json_length is None else int(json_length)
    return read_reply(library.InferenceServerClient.parse_response_body(body, header_length=length))


def _message(content: bytes) -> str:
    """Return the message of Triton's JSON error, or the start of another server's reply."""
    try:
        reply = json.loads(content)
    except ValueError:
        reply = None
    if isinstance(reply, dict) and "error" in reply:
        return str(reply["error"])
    return content[:200].decode("utf-8", errors="replace")
