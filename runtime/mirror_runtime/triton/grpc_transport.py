"""Requests to Triton over gRPC, through tritonclient, whose exceptions end here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray

from mirror_runtime.errors import MissingExtra
from mirror_runtime.triton.transport import OUTPUTS, Reply, read_reply, server_error, text_tensor

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
        with self._translated():
            self._client = library.InferenceServerClient(url)
        self._outputs = [library.InferRequestedOutput(name) for name in OUTPUTS]

    def submit(self, texts: NDArray[Any]) -> Callable[[], Reply]:
        """Send texts without waiting."""
        future: Future[Any] = Future()

        # tritonclient passes both by keyword: their names are part of its interface.
        def answered(result: Any, error: Exception | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        with self._translated():
            self._client.async_infer(
                self._model,
                [text_tensor(self._library, texts)],
                answered,
                outputs=self._outputs,
                client_timeout=self._timeout_s,
            )

        def wait() -> Reply:
            with self._translated():
                return read_reply(future.result())

        return wait

    def config(self) -> Mapping[str, Any]:
        """Fetch the model's configuration."""
        with self._translated():
            answer = self._client.get_model_config(self._model, as_json=True, client_timeout=self._timeout_s)
        config: Mapping[str, Any] = answer["config"]
        return config

    def statistics(self) -> Mapping[str, Any]:
        """Fetch the model's counters."""
        with self._translated():
            answer = self._client.get_inference_statistics(self._model, as_json=True, client_timeout=self._timeout_s)
        statistics: Mapping[str, Any] = answer["model_stats"][0]
        return statistics

    def close(self) -> None:
        """Close the channel."""
        self._client.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._library.InferenceServerException as error:
            code = (error.status() or "").removeprefix("StatusCode.")
            raise server_error(self._url, code, error.message(), invalid=code == "INVALID_ARGUMENT") from error
