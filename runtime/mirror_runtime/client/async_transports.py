"""Requests to Triton from asyncio, over gRPC or HTTP. Cancelling the waiting task cancels the request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from numpy.typing import NDArray

from mirror_runtime.client import grpc_transport, http_transport
from mirror_runtime.client.grpc_transport import CHANNEL, translate_errors
from mirror_runtime.client.http_transport import JSON_LENGTH, http_message, http_reply, http_request
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
from mirror_runtime.errors import DeadlineExceededError
from mirror_runtime.extras import require


class AsyncGrpcTransport:
    """Requests over one gRPC channel of one event loop."""

    body_bytes = grpc_transport.BODY_BYTES

    def __init__(self, url: str, model: str) -> None:
        library = require("tritonclient.grpc", "client")
        asynchronous = require("tritonclient.grpc.aio", "client")
        self._library, self._url, self._model = library, url, model
        self._client = asynchronous.InferenceServerClient(url, channel_args=CHANNEL)
        self._outputs = [library.InferRequestedOutput(name) for name in OUTPUTS]

    async def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Reply:
        """Send texts and wait for the reply."""
        with translate_errors(self._library, self._url):
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
        with translate_errors(self._library, self._url):
            reply = await self._client.get_model_config(self._model, as_json=True, client_timeout=timeout_s)
        config: Mapping[str, Any] = reply["config"]
        return config

    async def close(self) -> None:
        """Close the channel."""
        await self._client.close()


class AsyncHttpTransport:
    """Requests over HTTP connections of one event loop, kept open between requests."""

    body_bytes = http_transport.BODY_BYTES

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
        body, headers = http_request(self._library, texts, parameters, self._outputs, timeout_s)
        content, reply_headers = await self._exchange("POST", "infer", body, headers, timeout_s)
        json_length = reply_headers.get(JSON_LENGTH)
        return http_reply(self._library, content, None if json_length is None else int(json_length))

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
    ) -> tuple[bytes, Mapping[str, str]]:
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
            raise server_error(self._url, f"HTTP {response.status}", http_message(content))
        return content, response.headers
