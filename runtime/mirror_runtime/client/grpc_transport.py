"""Requests to Triton over gRPC, through tritonclient, whose exceptions become ours here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray

from mirror_runtime.client.protocol import (
    OUTPUTS,
    Parameters,
    Reply,
    microseconds,
    read_reply,
    server_error,
    text_tensor,
)
from mirror_runtime.extras import require

BODY_BYTES = 8_000_000
"""Most bytes of text in a request, so that one message neither fills memory nor delays the others."""

_CHANNEL = (
    # No limit on replies: 256 vectors of 4,096 components are 4 MB, which is gRPC's own limit.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # After an outage gRPC reconnects after growing pauses of up to two minutes: shorten them.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Detect a dead connection while requests wait on it, minutes before the operating system does.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 2),
)
"""Options of a channel."""


class GrpcTransport:
    """Requests over one gRPC channel."""

    body_bytes = BODY_BYTES

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        library = require("tritonclient.grpc", "client")
        self._library = library
        self._url, self._model, self._timeout_s = url, model, timeout_s
        with _translate_errors(library, url):
            self._client = library.InferenceServerClient(url, channel_args=_CHANNEL)
        self._outputs = [library.InferRequestedOutput(name) for name in OUTPUTS]

    def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Callable[[], Reply]:
        """Send texts without waiting."""
        future: Future[Any] = Future()

        # tritonclient passes both by keyword: their names are part of its interface.
        def settle(result: Any, error: Exception | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        with _translate_errors(self._library, self._url):
            self._client.async_infer(
                self._model,
                [text_tensor(self._library, texts)],
                settle,
                outputs=self._outputs,
                timeout=microseconds(timeout_s),
                client_timeout=timeout_s,
                parameters=dict(parameters),
            )

        def wait() -> Reply:
            with _translate_errors(self._library, self._url):
                return read_reply(future.result())

        return wait

    def config(self) -> Mapping[str, Any]:
        """Fetch the model's configuration."""
        with _translate_errors(self._library, self._url):
            reply = self._client.get_model_config(self._model, as_json=True, client_timeout=self._timeout_s)
        config: Mapping[str, Any] = reply["config"]
        return config

    def statistics(self) -> Mapping[str, Any]:
        """Fetch the model's counters."""
        with _translate_errors(self._library, self._url):
            reply = self._client.get_inference_statistics(self._model, as_json=True, client_timeout=self._timeout_s)
        statistics: Mapping[str, Any] = reply["model_stats"][-1]
        return statistics

    def close(self) -> None:
        """Close the channel."""
        self._client.close()


class AsyncGrpcTransport:
    """`GrpcTransport` of one event loop. Cancelling the waiting task cancels the request."""

    body_bytes = BODY_BYTES

    def __init__(self, url: str, model: str) -> None:
        library = require("tritonclient.grpc", "client")
        asynchronous = require("tritonclient.grpc.aio", "client")
        self._library, self._url, self._model = library, url, model
        self._client = asynchronous.InferenceServerClient(url, channel_args=_CHANNEL)
        self._outputs = [library.InferRequestedOutput(name) for name in OUTPUTS]

    async def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Reply:
        """Send texts and wait for the reply."""
        with _translate_errors(self._library, self._url):
            result = await self._client.infer(
                self._model,
                [text_tensor(self._library, texts)],
                outputs=self._outputs,
                timeout=microseconds(timeout_s),
                client_timeout=timeout_s,
                parameters=dict(parameters),
            )
        return read_reply(result)

    async def config(self, timeout_s: float) -> Mapping[str, Any]:
        """Fetch the model's configuration."""
        with _translate_errors(self._library, self._url):
            reply = await self._client.get_model_config(self._model, as_json=True, client_timeout=timeout_s)
        config: Mapping[str, Any] = reply["config"]
        return config

    async def close(self) -> None:
        """Close the channel."""
        await self._client.close()


@contextlib.contextmanager
def _translate_errors(library: Any, url: str) -> Iterator[None]:
    """Convert tritonclient's exceptions to ours."""
    try:
        yield
    except library.InferenceServerException as error:
        code = (error.status() or "").removeprefix("StatusCode.")
        raise server_error(url, code, error.message()) from error
