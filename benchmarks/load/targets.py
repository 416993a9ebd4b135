"""What the load generator can send requests to: Triton over gRPC or HTTP, and `mirror gateway`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence

import aiohttp
import numpy as np

from mirror_runtime.client.async_client import AsyncClient
from mirror_runtime.client.grpc_transport import AsyncGrpcTransport
from mirror_runtime.client.http_transport import AsyncHttpTransport
from mirror_runtime.client.protocol import MODEL_NAME, Parameters
from mirror_runtime.errors import DeadlineExceededError, OverloadedError, ServerError, UnavailableError
from mirror_runtime.vectors import Vectors

GRPC, HTTP, GATEWAY = "grpc", "http", "gateway"
"""Names of the targets: Triton's two protocols, and the gateway's own API."""


class TritonTarget:
    """Triton over one protocol. Ordinary requests go through `AsyncClient`, bad ones straight to its transport.

    Args:
        protocol: "grpc" or "http".
        address: host and port.
        timeout_s: of one request.
        fingerprint: vector space that answers must name; None accepts any.
    """

    def __init__(self, protocol: str, address: str, timeout_s: float, fingerprint: str | None) -> None:
        self._timeout_s = timeout_s
        self._client = AsyncClient(
            address, protocol=protocol, timeout_s=timeout_s, fingerprint=fingerprint, patient=False
        )
        transport = AsyncGrpcTransport if protocol == GRPC else AsyncHttpTransport
        self._transport = transport(address, MODEL_NAME)

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Send texts in one request and return their vectors."""
        return await self._client.encode(texts, len(texts))

    async def submit(self, texts: Sequence[bytes], parameters: Parameters) -> None:
        """Send bytes and parameters as they are."""
        await self._transport.submit(np.array(texts, np.object_).reshape(-1, 1), parameters, self._timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await self._transport.close()


class GatewayTarget:
    """The gateway's /embed over HTTP connections that stay open."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._url = f"http://{address}/embed"
        self._session = aiohttp.ClientSession(
            # As many connections as there are requests under way.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Send texts in one request and return their vectors, float32 [texts, dim]."""
        try:
            async with self._session.post(self._url, json={"inputs": list(texts)}) as response:
                content = await response.read()
        except asyncio.TimeoutError as error:
            raise DeadlineExceededError("the gateway did not answer in time") from error
        except aiohttp.ClientError as error:
            raise UnavailableError(f"the gateway did not answer: {error or type(error).__name__}") from error
        if response.status != 200:
            kind = OverloadedError if response.status in (429, 503) else ServerError
            raise kind(f"the gateway answered HTTP {response.status}: {_shown(content)}")
        try:
            return np.asarray(json.loads(content), np.float32)
        except ValueError as error:
            raise ServerError(f"the gateway's answer is not vectors: {_shown(content)}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


Target = TritonTarget | GatewayTarget
"""A server as one event loop reaches it. Every failure is a `MirrorError`; an overloaded server is not retried."""


def open_targets(addresses: Mapping[str, str], timeout_s: float, fingerprint: str | None) -> dict[str, Target]:
    """Open the targets `GRPC`, `HTTP` and `GATEWAY` of an event loop, as far as they have an address."""
    return {
        name: GatewayTarget(address, timeout_s)
        if name == GATEWAY
        else TritonTarget(name, address, timeout_s, fingerprint)
        for name, address in addresses.items()
    }


def _shown(content: bytes) -> str:
    return content[:200].decode("utf-8", "replace")
