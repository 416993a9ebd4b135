"""A client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from mirror_runtime.client.exchange import BATCH_TOKENS, PROBE, CallOptions, Exchange, Served, as_list
from mirror_runtime.client.grpc_transport import AsyncGrpcTransport
from mirror_runtime.client.http_transport import AsyncHttpTransport
from mirror_runtime.client.protocol import (
    MODEL_NAME,
    ClientOptions,
    ModelFacts,
    read_facts,
    read_fingerprint,
)
from mirror_runtime.errors import MirrorError, OverloadedError, ServerError
from mirror_runtime.vectors import Vectors


class AsyncClient:
    """`Client` for asyncio: any number of tasks of one event loop may share it. An async context manager.

    Cancelling a task that waits for `encode` cancels its requests; Triton drops those that it has not begun.

    ```python
    async with AsyncClient("127.0.0.1:8001") as client:
        vectors = await client.encode(["a text"])
    ```

    Args:
        url: see `Client`, and so are the following.
        protocol: see `Client`.
        model: see `Client`.
        timeout_s: see `Client`.
        in_flight: most requests of one call under way at once.
        batch_tokens: see `Client`.
        fingerprint: see `Client`.
        patient: repeat requests that an overloaded server refused. False raises the refusal immediately, for callers
            that pass it on.

    Raises:
        InputError: an option is invalid.
        MissingExtra: tritonclient is not installed; raised by the first call.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        protocol: str = "grpc",
        model: str = MODEL_NAME,
        timeout_s: float = 60.0,
        in_flight: int = 4,
        batch_tokens: int = BATCH_TOKENS,
        fingerprint: str | None = None,
        patient: bool = True,
    ) -> None:
        self._options = ClientOptions(
            url=url,
            protocol=protocol,
            model=model,
            timeout_s=timeout_s,
            in_flight=in_flight,
            batch_tokens=batch_tokens,
            fingerprint=fingerprint,
            patient=patient,
        )
        self._connection: AsyncGrpcTransport | AsyncHttpTransport | None = None
        self._facts: ModelFacts | None = None

    async def encode(
        self,
        texts: Iterable[str],
        batch_size: int = 32,
        *,
        deadline_s: float | None = None,
        truncate: bool | None = None,
        dimensions: int | None = None,
        prompt: str | None = None,
        query: str | None = None,
        speed: str | None = None,
    ) -> Vectors:
        """Encode texts: see `Client.encode`."""
        served = await self.encode_detailed(
            texts,
            batch_size,
            deadline_s=deadline_s,
            truncate=truncate,
            dimensions=dimensions,
            prompt=prompt,
            query=query,
            speed=speed,
        )
        return served.vectors_or_raise()

    async def encode_detailed(
        self,
        texts: Iterable[object],
        batch_size: int = 32,
        *,
        deadline_s: float | None = None,
        truncate: bool | None = None,
        dimensions: int | None = None,
        prompt: str | None = None,
        query: str | None = None,
        speed: str | None = None,
    ) -> Served:
        """Encode texts; return vectors, token counts and errors: see `Client.encode_detailed`."""
        items = as_list(texts)
        if self._facts is None:
            self._facts = read_facts(await self._transport.config(self._options.timeout_s))
        exchange = Exchange(
            items,
            CallOptions(
                batch_size=batch_size,
                deadline_s=deadline_s,
                truncate=truncate,
                dimensions=dimensions,
                prompt=prompt,
                query=query,
                speed=speed,
            ),
            self._options,
            self._facts,
            body_bytes=self._transport.body_bytes,
        )
        while exchange.next_round():
            await self._send_all(exchange)
        return exchange.result()

    async def ready(self) -> bool:
        """Return whether a real inference succeeds: health endpoints stay green while a model is dead."""
        try:
            await self._transport.submit(PROBE.tensor(), {}, self._options.timeout_s)
        except (OverloadedError, ServerError):
            return False
        return True

    async def fingerprint(self) -> str:
        """Fetch the fingerprint of the model's vector space: see `Client.fingerprint`."""
        return read_fingerprint(await self._transport.config(self._options.timeout_s))

    async def close(self) -> None:
        """Close the connections."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def _transport(self) -> AsyncGrpcTransport | AsyncHttpTransport:
        """The connection. It is opened at the first use and belongs to the event loop that runs then."""
        if self._connection is None:
            kind = AsyncGrpcTransport if self._options.protocol == "grpc" else AsyncHttpTransport
            self._connection = kind(self._options.address, self._options.model)
        return self._connection

    async def _send_all(self, exchange: Exchange) -> None:
        """Send a round's requests from up to `in_flight` tasks."""

        async def send() -> None:
            while request := exchange.next_request():
                if request.pause_s:
                    await asyncio.sleep(request.pause_s)
                timeout_s = exchange.remaining_s()
                try:
                    reply = await self._transport.submit(request.tensor(), exchange.parameters, timeout_s)
                except MirrorError as error:
                    exchange.failed(request, error)
                else:
                    exchange.succeeded(request, reply)

        tasks = [asyncio.ensure_future(send()) for _ in range(min(self._options.in_flight, exchange.count))]
        try:
            await asyncio.gather(*tasks)
        finally:  # one failed, or the caller was cancelled: the others are of no use
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
