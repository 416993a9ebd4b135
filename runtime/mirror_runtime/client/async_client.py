"""Vectors from a running Triton server, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from types import TracebackType

from mirror_runtime.client.async_transports import AsyncGrpcTransport, AsyncHttpTransport
from mirror_runtime.client.calls import (
    BATCH_TOKENS,
    PROBE,
    Call,
    ModelFacts,
    check_batch_size,
    check_options,
    read_facts,
    read_fingerprint,
)
from mirror_runtime.client.chunks import (
    REPLACEMENTS,
    Chunk,
    Limits,
    Served,
    assembled,
    check_fingerprint,
    chunked,
    current,
    listed,
    outdated,
)
from mirror_runtime.client.protocol import MODEL_NAME, AsyncTransport, Rejected, Reply
from mirror_runtime.client.retry import Backoff
from mirror_runtime.errors import OverloadedError, ServerError, TextError, UnavailableError
from mirror_runtime.vectors import Vectors


class AsyncClient:
    """`Client` for asyncio: any number of tasks of one event loop may share it. An async context manager.

    Cancelling a task that waits for `encode` cancels its requests; Triton drops those that it has not begun.

    ```python
    async with AsyncClient("127.0.0.1:8001") as client:
        vectors = await client.encode(["a text"])
    ```

    Args:
        url: host and port; None means this machine's 8001 for gRPC and 8000 for HTTP.
        protocol: "grpc" or "http".
        model: the model's name.
        timeout_s: how long one request may take, tries and pauses included, in seconds.
        in_flight: how many requests of one call are under way at once.
        batch_tokens: tokens a request, estimated from the texts' lengths; one text alone may have more.
        fingerprint: of the vector space that is wanted. Another one is an error. None takes any.
        patient: ask a server that has too much to do again. False passes its refusal on at once, for callers that
            refuse in their turn.

    Raises:
        InputError: an option is wrong.
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
        self._url = check_options(url, protocol, timeout_s, in_flight, batch_tokens)
        self._protocol, self._model = protocol, model
        self._timeout_s, self._in_flight, self._batch_tokens = timeout_s, in_flight, batch_tokens
        self._expected, self._patient = fingerprint, patient
        self._connection: AsyncTransport | None = None
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
    ) -> Vectors:
        """Give the vectors of texts: see `Client.encode`."""
        encoded = await self.encode_detailed(
            texts, batch_size, deadline_s=deadline_s, truncate=truncate, dimensions=dimensions, prompt=prompt
        )
        if encoded.errors:
            raise encoded.errors[min(encoded.errors)]
        return encoded.vectors

    async def encode_detailed(
        self,
        texts: Iterable[object],
        batch_size: int = 32,
        *,
        deadline_s: float | None = None,
        truncate: bool | None = None,
        dimensions: int | None = None,
        prompt: str | None = None,
    ) -> Served:
        """Give vectors, token counts and errors: see `Client.encode_detailed`."""
        items = listed(texts)
        facts = await self._model_facts()
        check_batch_size(batch_size, facts)
        call = Call.begin(self._timeout_s, deadline_s, truncate=truncate, dimensions=dimensions, prompt=prompt)
        limits = Limits(texts=batch_size, tokens=self._batch_tokens, body_bytes=self._transport.body_bytes)
        errors: dict[int, TextError] = {}
        replies = await self._replies(list(chunked(items, limits, errors)), call, errors)
        for _ in range(REPLACEMENTS):
            if not outdated(replies):
                break
            replies = [*current(replies), *await self._replies(outdated(replies), call, errors)]
        else:
            raise ServerError("the model was replaced again and again during the call: try later")
        check_fingerprint(self._expected, replies)
        return assembled(len(items), replies, errors, facts.empty(dimensions))

    async def ready(self) -> bool:
        """Say whether a real inference succeeds: health endpoints stay green while a model is dead."""
        try:
            await self._transport.submit(PROBE.tensor(), {}, self._timeout_s)
        except (OverloadedError, ServerError):
            return False
        return True

    async def fingerprint(self) -> str:
        """Fetch the name of the model's vector space: see `Client.fingerprint`."""
        return read_fingerprint(await self._transport.config(self._timeout_s))

    async def close(self) -> None:
        """Close the connections."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _transport(self) -> AsyncTransport:
        """The connection, made at the first use: it belongs to the event loop that runs then."""
        if self._connection is None:
            kind = AsyncGrpcTransport if self._protocol == "grpc" else AsyncHttpTransport
            self._connection = kind(self._url, self._model)
        return self._connection

    async def _model_facts(self) -> ModelFacts:
        if self._facts is None:
            self._facts = read_facts(await self._transport.config(self._timeout_s))
        return self._facts

    async def _replies(
        self, chunks: Sequence[Chunk], call: Call, errors: dict[int, TextError]
    ) -> list[tuple[Chunk, Reply]]:
        """Send chunks with several under way, and give the replies in the order they came."""
        gate = asyncio.Semaphore(self._in_flight)
        replies: list[tuple[Chunk, Reply]] = []

        async def answer(chunk: Chunk) -> None:
            async with gate:
                await self._settle(chunk, call, replies, errors)

        tasks = [asyncio.ensure_future(answer(chunk)) for chunk in chunks]
        try:
            await asyncio.gather(*tasks)
        finally:  # one failed, or the caller gave up: the others are of no use
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return replies

    async def _settle(
        self, chunk: Chunk, call: Call, replies: list[tuple[Chunk, Reply]], errors: dict[int, TextError]
    ) -> None:
        """Get a reply; halve a refused request until the texts that are at fault stand alone."""
        backoff = Backoff(call.gives_up_at())
        while True:
            try:
                reply = await self._transport.submit(chunk.tensor(), call.parameters, call.patience())
            except (OverloadedError, UnavailableError) as refusal:
                if isinstance(refusal, OverloadedError) and not self._patient:
                    raise
                await asyncio.sleep(backoff.pause(refusal))
                continue
            except Rejected as error:
                if len(chunk.texts) == 1:
                    errors[chunk.positions[0]] = chunk.fault(error)
                    return
                for half in chunk.halves():
                    await self._settle(half, call, replies, errors)
                return
            replies.append((chunk, reply))
            return
