"""Requests to Triton over gRPC, through tritonclient, whose exceptions end here."""

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
from mirror_runtime.errors import MissingExtra

BODY_BYTES = 8_000_000
"""A request of more is split, so that one message neither fills memory nor holds up the others."""


class GrpcTransport:
    """Requests over one gRPC channel."""

    body_bytes = BODY_BYTES

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        try:
            import tritonclient.grpc as library
        except ImportError as error:
            raise MissingExtra("tritonclient", "client") from error
        self._library = library
        self._url, self._model, self._timeout_s = url, model, timeout_s
        with translated(library, url):
            self._client = library.InferenceServerClient(url, channel_args=CHANNEL)
        self._outputs = [library.InferRequestedOutput(name) for name in OUTPUTS]

    def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Callable[[], Reply]:
        """Send texts without waiting."""
        future: Future[Any] = Future()

        # tritonclient passes both by keyword: their names are part of its interface.
        def answered(result: Any, error: Exception | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        with translated(self._library, self._url):
            self._client.async_infer(
                self._model,
                [text_tensor(self._library, texts)],
                answered,
                outputs=self._outputs,
                timeout=microseconds(timeout_s),
                client_timeout=timeout_s,
                parameters=dict(parameters),
            )

        def wait() -> Reply:
            with translated(self._library, self._url):
                return read_reply(future.result())

        return wait

    def config(self) -> Mapping[str, Any]:
        """Fetch the model's configuration."""
        with translated(self._library, self._url):
            answer = self._client.get_model_config(self._model, as_json=True, client_timeout=self._timeout_s)
        config: Mapping[str, Any] = answer["config"]
        return config

    def statistics(self) -> Mapping[str, Any]:
        """Fetch the model's counters."""
        with translated(self._library, self._url):
            answer = self._client.get_inference_statistics(self._model, as_json=True, client_timeout=self._timeout_s)
        statistics: Mapping[str, Any] = answer["model_stats"][-1]
        return statistics

    def close(self) -> None:
        """Close the channel."""
        self._client.close()


CHANNEL = (
    # No bound on what comes back: 256 vectors of 4,096 components are 4 MB, gRPC's own bound.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # After an outage gRPC waits longer and longer before it connects again, two minutes in the end: keep it short.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # See that a connection is dead while requests wait on it, not only when the system gives up after minutes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 2),
)
"""How connections are kept."""


@contextlib.contextmanager
def translated(library: Any, url: str) -> Iterator[None]:
    """Turn tritonclient's exceptions into ours."""
    try:
        yield
    except library.InferenceServerException as error:
        code = (error.status() or "").removeprefix("StatusCode.")
        raise server_error(url, code, error.message()) from error
