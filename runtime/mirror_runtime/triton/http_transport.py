"""Requests to Triton over HTTP: tritonclient writes and reads the bodies, the standard library carries them.

tritonclient's own HTTP client sleeps 10 ms in every `async_infer` and is bound to one thread, where it leaves a gevent
hub with threads and file descriptors behind.
"""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from numpy.typing import NDArray

from mirror_runtime.errors import MissingExtra, ServerError
from mirror_runtime.triton.transport import OUTPUTS, Reply, read_reply, server_error, text_tensor

BODY_BYTES = 1_000_000
"""Triton 2.51, the version in the pytriton wheel, crashes on HTTP bodies of about 4 MB. 2 MB were seen to pass."""

_JSON_LENGTH = "Inference-Header-Content-Length"


class HttpTransport:
    """Requests over as many connections as may be in flight, kept open between requests."""

    body_bytes = BODY_BYTES

    def __init__(self, url: str, model: str, timeout_s: float, in_flight: int) -> None:
        try:
            import tritonclient.http as library
        except ImportError as error:
            raise MissingExtra("tritonclient", "client") from error
        self._library = library
        self._url, self._timeout_s = url, timeout_s
        self._path = f"/v2/models/{quote(model, safe='')}"
        self._outputs = [library.InferRequestedOutput(name, binary_data=True) for name in OUTPUTS]
        self._idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="mirror-http")

    def submit(self, texts: NDArray[Any]) -> Callable[[], Reply]:
        """Send texts without waiting."""
        client = self._library.InferenceServerClient
        body, json_length = client.generate_request_body([text_tensor(self._library, texts)], outputs=self._outputs)
        headers = {"Content-Type": "application/octet-stream"}
        if json_length is not None:
            headers[_JSON_LENGTH] = str(json_length)
        future = self._pool.submit(self._exchange, "POST", f"{self._path}/infer", body, headers)

        def wait() -> Reply:
            answer, answer_json_length = future.result()
            return read_reply(client.parse_response_body(answer, header_length=answer_json_length))

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

    def _get(self, what: str) -> Mapping[str, Any]:
        body, _ = self._exchange("GET", f"{self._path}/{what}", None, {})
        answer: Mapping[str, Any] = json.loads(body)
        return answer

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[bytes, int | None]:
        """Send one request and give the answer's body with the length of its JSON part, if it says so."""
        try:
            connection = self._idle.get_nowait()
            kept = True
        except queue.Empty:
            connection, kept = self._connect(), False
        try:
            try:
                response = _round_trip(connection, method, path, body, headers)
            except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
                if not kept:
                    raise
                # The server closed it while it lay idle. The request is the same if it is sent twice.
                connection.close()
                response = _round_trip(connection, method, path, body, headers)
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            what = str(error) or type(error).__name__
            raise ServerError(
                f"{self._url}: {what}. Is the server running there, and is this its HTTP port?"
            ) from error
        self._idle.put(connection)
        if response.status != 200:
            raise server_error(self._url, f"HTTP {response.status}", _message(content), invalid=response.status == 400)
        json_length = response.getheader(_JSON_LENGTH)
        return content, None if json_length is None else int(json_length)

    def _connect(self) -> http.client.HTTPConnection:
        try:
            return http.client.HTTPConnection(self._url, timeout=self._timeout_s)
        except http.client.InvalidURL as error:
            raise ServerError(f"{self._url} is no host:port: {error}") from error


def _round_trip(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    connection.request(method, path, body, dict(headers))
    return connection.getresponse()


def _message(content: bytes) -> str:
    """Read Triton's JSON error; another server's answer is given as it is, up to a line's length."""
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        return str(answer["error"])
    return content[:200].decode("utf-8", errors="replace")
