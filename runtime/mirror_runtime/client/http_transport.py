"""Requests to Triton over HTTP: tritonclient writes and reads the bodies, the standard library carries them.

tritonclient's own HTTP client sleeps 10 ms in every `async_infer` and is bound to one thread, where it leaves a gevent
hub with threads and file descriptors behind.
"""

from __future__ import annotations

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
from mirror_runtime.errors import DeadlineExceededError, MissingExtra, ServerError

BODY_BYTES = 1_000_000
"""Triton 2.51, the version in the pytriton wheel, crashes on HTTP bodies of about 4 MB. 2 MB were seen to pass."""

JSON_LENGTH = "Inference-Header-Content-Length"


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

    def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Callable[[], Reply]:
        """Send texts without waiting."""
        body, headers = http_request(self._library, texts, parameters, self._outputs, timeout_s)
        give_up_at = time.monotonic() + timeout_s
        future = self._pool.submit(self._exchange, "POST", f"{self._path}/infer", body, headers, give_up_at)

        def wait() -> Reply:
            return http_reply(self._library, *future.result())

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
        body, _ = self._exchange("GET", f"{self._path}/{what}", None, {}, time.monotonic() + self._timeout_s)
        answer: Mapping[str, Any] = json.loads(body)
        return answer

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], give_up_at: float
    ) -> tuple[bytes, int | None]:
        """Send one request and give the answer's body with the length of its JSON part, if it says so."""
        try:
            connection = self._idle.get_nowait()
            kept = True
        except queue.Empty:
            connection, kept = self._connect(), False
        try:
            try:
                response = _round_trip(connection, method, path, body, headers, give_up_at)
            except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
                if not kept:
                    raise
                # The server closed it while it lay idle. The request is the same if it is sent twice.
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
            raise server_error(self._url, f"HTTP {response.status}", http_message(content))
        json_length = response.getheader(JSON_LENGTH)
        return content, None if json_length is None else int(json_length)

    def _connect(self) -> http.client.HTTPConnection:
        try:
            return http.client.HTTPConnection(self._url, timeout=self._timeout_s)
        except http.client.InvalidURL as error:
            raise ServerError(f"{self._url} is no host:port: {error}") from error


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


def http_request(
    library: Any, texts: NDArray[Any], parameters: Parameters, outputs: Sequence[Any], timeout_s: float
) -> tuple[bytes, dict[str, str]]:
    """Write a request's body and headers with tritonclient.http."""
    body, json_length = library.InferenceServerClient.generate_request_body(
        [text_tensor(library, texts)], outputs=outputs, timeout=microseconds(timeout_s), parameters=dict(parameters)
    )
    headers = {"Content-Type": "application/octet-stream"}
    if json_length is not None:
        headers[JSON_LENGTH] = str(json_length)
    return body, headers


def http_reply(library: Any, body: bytes, json_length: int | None) -> Reply:
    """Read an answer's body with tritonclient.http."""
    return read_reply(library.InferenceServerClient.parse_response_body(body, header_length=json_length))


def http_message(content: bytes) -> str:
    """Read Triton's JSON error; another server's answer is given as it is, up to a line's length."""
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        return str(answer["error"])
    return content[:200].decode("utf-8", errors="replace")
