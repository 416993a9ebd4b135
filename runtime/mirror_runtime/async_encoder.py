"""Many asyncio callers, one engine: their texts are gathered into packed rows, under a deadline and a bound.

Texts that arrive while the engine works wait and leave together; texts that arrive while it rests wait `max_wait_ms`
for company. Two micro-batches are under way at once, so that one is tokenised while the other runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.encoder import Encoded, Encoder
from mirror_runtime.errors import EngineError, InputError, OverloadedError, TextError
from mirror_runtime.packing import TOKEN_BUDGET
from mirror_runtime.tokenizer import defect
from mirror_runtime.vectors import Vectors, dtype_of, width_of

UNDER_WAY = 2
"""Micro-batches at once: one in the engine, one being tokenised and queued behind it."""

CHARACTERS_PER_TOKEN = 4
"""To guess a text's tokens before it is tokenised; 3.5 to 5 in English prose."""

_Outcome: TypeAlias = "tuple[Vectors, int, bool] | Exception"
"""A text's vector, its tokens and whether it was cut; or what kept it from having one."""


@dataclass(frozen=True, kw_only=True)
class AsyncStats:
    """What an `AsyncEncoder` has done, and what it is doing.

    Attributes:
        calls: calls of `encode` that were taken.
        refused: calls that met a full queue.
        cancelled: calls whose caller gave up.
        texts: texts of the taken calls.
        shared: of them, those that joined an equal text already waiting or running.
        dropped: texts never computed, because every caller gave up while they waited.
        batches: micro-batches handed to the encoder.
        waiting: texts waiting now.
        running: texts under way now.
    """

    calls: int = 0
    refused: int = 0
    cancelled: int = 0
    texts: int = 0
    shared: int = 0
    dropped: int = 0
    batches: int = 0
    waiting: int = 0
    running: int = 0


@dataclass(eq=False)
class _Call:
    """One call: where what it asked for gathers until the last text is there."""

    vectors: Vectors
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    errors: dict[int, TextError]
    done: asyncio.Future[None]
    missing: int


@dataclass(eq=False)
class _Text:
    """A distinct text that waits or runs, and the places that want its vector."""

    tokens: int
    started: bool = False
    places: list[tuple[_Call, int]] = field(default_factory=list)


class AsyncEncoder:
    """Encodes for many concurrent callers of one event loop. The encoder below stays its owner's to close.

    ```python
    async with AsyncEncoder(Encoder.load("bundle")) as encoder:
        vectors = await encoder.encode(["a text"])
    ```

    Args:
        encoder: what computes. It may be used directly at the same time.
        max_wait_ms: how long a text waits for others while the engine rests. With 2: a lone caller gets its vector
            2 ms later than it could, and callers that come within 2 ms of each other share an execution.
        max_batch_tokens: tokens after which a micro-batch leaves without waiting longer, estimated from the texts'
            lengths. None: one full batch for each of the engine's streams.
        max_waiting: texts that may wait. A call that would make them more is refused.

    Raises:
        InputError: a limit is not positive.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        max_wait_ms: float = 2.0,
        max_batch_tokens: int | None = None,
        max_waiting: int = 8192,
    ) -> None:
        if max_wait_ms < 0 or max_waiting < 1 or (max_batch_tokens is not None and max_batch_tokens < 1):
            raise InputError(
                f"max_wait_ms is {max_wait_ms}, max_waiting {max_waiting}, max_batch_tokens {max_batch_tokens}: "
                "the wait may be 0, the others must be at least 1"
            )
        self._encoder = encoder
        self._wait_s = max_wait_ms / 1000
        self._batch_tokens = max_batch_tokens or TOKEN_BUDGET * encoder.engine.streams
        self._max_waiting = max_waiting
        self._workers = ThreadPoolExecutor(UNDER_WAY, thread_name_prefix="mirror-async")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._texts: dict[str, _Text] = {}  # waiting and running ones
        self._queue: dict[str, _Text] = {}  # waiting ones, oldest first
        self._queued_tokens = 0
        self._under_way = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._idle: asyncio.Future[None] | None = None
        self._stats = AsyncStats()

    @property
    def stats(self) -> AsyncStats:
        """A snapshot of the counters; the encoder's own are in its `stats`."""
        waiting = len(self._queue)
        return replace(self._stats, waiting=waiting, running=len(self._texts) - waiting)

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Encode texts together with those of other callers.

        Cancelling the call drops those of its texts that nobody else wants and that have not started.

        Args:
            texts: a list of strings; equal texts, of this call or of others, are computed once.

        Returns:
            As `Encoder.encode`, in the texts' order; the caller's own array.

        Raises:
            TextError: naming the first text that cannot be encoded. Other callers are unharmed.
            OverloadedError: too many texts wait already. Raised at once: nothing was queued.
            EngineError: the engine failed, or this is closed or belongs to another event loop.
            InputError: `texts` is one string.
        """
        if not isinstance(texts, (str, bytes)):
            for position, text in enumerate(texts):
                if (error := defect(position, text)) is not None:
                    raise error  # before anything is queued
        encoded = await self.encode_detailed(texts)
        if encoded.errors:
            raise encoded.errors[min(encoded.errors)]
        return encoded.vectors

    async def encode_detailed(self, texts: Sequence[object]) -> Encoded:
        """Encode texts together with those of other callers, and say what happened to each.

        A bad text never raises: it is named in `errors`. Cancelling works as for `encode`.

        Args:
            texts: a list; equal texts, of this call or of others, are computed once.

        Returns:
            As `Encoder.encode_detailed`; the arrays are the caller's own.

        Raises:
            OverloadedError: too many texts wait already. Raised at once: nothing was queued.
            EngineError: the engine failed, or this is closed or belongs to another event loop.
            InputError: `texts` is one string.
        """
        if isinstance(texts, (str, bytes)):
            raise InputError(f"texts is one {type(texts).__name__}: pass a list, such as [text]")
        loop = self._own_loop()
        count, spec = len(texts), self._encoder.spec
        call = _Call(
            vectors=np.zeros((count, width_of(spec)), dtype_of(spec)),
            tokens=np.zeros(count, np.int64),
            truncated=np.zeros(count, np.bool_),
            errors={i: error for i, text in enumerate(texts) if (error := defect(i, text)) is not None},
            done=loop.create_future(),
            missing=0,
        )
        good = {i: str(text) for i, text in enumerate(texts) if i not in call.errors}
        call.missing = len(good)
        self._admit(good.values())
        for position, text in good.items():
            self._want(text, call, position)
        if good:
            self._dispatch()
            try:
                await call.done
            except asyncio.CancelledError:
                self._stats = replace(self._stats, cancelled=self._stats.cancelled + 1)
                self._forget(good.values(), call)
                raise
        return Encoded(vectors=call.vectors, tokens=call.tokens, truncated=call.truncated, errors=call.errors)

    async def aclose(self) -> None:
        """Take no more calls, finish those that were taken, and release the threads."""
        self._closed = True
        if self._texts:
            self._send()
            if self._idle is None:
                self._idle = self._own_loop().create_future()
            await self._idle
        self._workers.shutdown(wait=False)

    async def __aenter__(self) -> AsyncEncoder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise EngineError("this AsyncEncoder belongs to another event loop: make one for each")
        return loop

    def _admit(self, texts: Collection[str]) -> None:
        """Refuse a call before anything of it is queued."""
        if self._closed:
            raise EngineError("this AsyncEncoder is closed")
        more = len({text for text in texts if text not in self._texts})
        if more and len(self._queue) + more > self._max_waiting:
            self._stats = replace(self._stats, refused=self._stats.refused + 1)
            raise OverloadedError(
                f"{len(self._queue)} texts wait and {more} more would exceed {self._max_waiting}: try again later"
            )
        self._stats = replace(self._stats, calls=self._stats.calls + 1, texts=self._stats.texts + len(texts))

    def _want(self, text: str, call: _Call, position: int) -> None:
        known = self._texts.get(text)
        if known is None:
            known = self._texts[text] = self._queue[text] = _Text(tokens=2 + len(text) // CHARACTERS_PER_TOKEN)
            self._queued_tokens += known.tokens
        else:
            self._stats = replace(self._stats, shared=self._stats.shared + 1)
        known.places.append((call, position))

    def _forget(self, texts: Collection[str], call: _Call) -> None:
        """Take a cancelled call's wishes back; texts that nobody wants any more leave the queue."""
        for text in set(texts):
            known = self._texts.get(text)
            if known is None:
                continue
            known.places = [place for place in known.places if place[0] is not call]
            if not known.places and not known.started:
                del self._texts[text], self._queue[text]
                self._queued_tokens -= known.tokens
                self._stats = replace(self._stats, dropped=self._stats.dropped + 1)
        self._settle()

    def _dispatch(self) -> None:
        """Send what is queued, now or when the deadline comes."""
        if not self._queue or self._under_way >= UNDER_WAY:
            return  # the next batch that ends calls again
        if self._queued_tokens >= self._batch_tokens or not self._wait_s or self._closed:
            self._send()
        elif self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(self._wait_s, self._send)

    def _send(self) -> None:
        """Hand micro-batches to the workers while there are texts and room."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and self._under_way < UNDER_WAY:
            batch: dict[str, _Text] = {}
            tokens = 0
            while self._queue and tokens < self._batch_tokens:
                text = next(iter(self._queue))
                batch[text] = waiting = self._queue.pop(text)
                waiting.started = True
                tokens += waiting.tokens
            self._queued_tokens -= tokens
            self._under_way += 1
            self._stats = replace(self._stats, batches=self._stats.batches + 1)
            self._workers.submit(self._work, batch)

    def _work(self, batch: dict[str, _Text]) -> None:
        """Compute one micro-batch in a worker thread."""
        outcomes: list[_Outcome]
        try:
            encoded = self._encoder.finish(self._encoder.begin(list(batch), direct=True))
            found = zip(encoded.vectors, encoded.tokens.tolist(), encoded.truncated.tolist(), strict=True)
            outcomes = [encoded.errors.get(i, outcome) for i, outcome in enumerate(found)]
        except Exception as error:  # the edge of a thread: whatever happened, every caller gets an answer
            outcomes = [error] * len(batch)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, batch, outcomes)

    def _deliver(self, batch: dict[str, _Text], outcomes: Sequence[_Outcome]) -> None:
        """Give each caller what it waited for, back in the event loop."""
        self._under_way -= 1
        for (text, known), outcome in zip(batch.items(), outcomes, strict=True):
            del self._texts[text]
            for call, position in known.places:
                if call.done.done():  # cancelled, or failed with another batch
                    continue
                if isinstance(outcome, TextError):
                    call.errors[position] = TextError(position, outcome.reason)
                elif isinstance(outcome, Exception):
                    call.done.set_exception(outcome)
                    continue
                else:
                    call.vectors[position], call.tokens[position], call.truncated[position] = outcome
                call.missing -= 1
                if not call.missing:
                    call.done.set_result(None)
        self._settle()
        self._dispatch()

    def _settle(self) -> None:
        if self._idle is not None and not self._texts and not self._idle.done():
            self._idle.set_result(None)
