"""One encoder for many asyncio callers: their texts share micro-batches, within a waiting time and a queue limit.

While the engine is busy, arriving texts queue and form the next micro-batch. While it is idle, a text waits up to
`max_wait_ms` for others. Two micro-batches run at once, so that one is tokenised while the engine runs the other. Very
long texts have a queue and a thread of their own: tokenising one of 4 MB takes seconds, in which other texts pass.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.encoded import check_text_vectors
from mirror_runtime.encoder import Encoded, Encoder
from mirror_runtime.errors import EngineError, InputError, OverloadedError, TextError
from mirror_runtime.packing import TOKEN_BUDGET
from mirror_runtime.pairs import validator_of
from mirror_runtime.retry_after import RetryEstimator
from mirror_runtime.tokenizer import LONG_CHARACTERS, Item, characters
from mirror_runtime.vectors import Vectors, dtype_of, width_of

CONCURRENT_BATCHES = 2
"""Micro-batches at once: one in the engine, and one that is tokenised and queued behind it."""

CHARACTERS_PER_TOKEN = 4
"""For estimates before tokenising; 3.5 to 5 in English prose."""

_Outcome: TypeAlias = "tuple[Vectors, int, bool] | Exception"
"""A text's vector or vectors, its token count and whether it was truncated; or the error instead."""


def estimate_tokens(text: Item) -> int:
    """Estimate the tokens of a text or a pair from its length, special tokens included."""
    return 2 + characters(text) // CHARACTERS_PER_TOKEN


@dataclass(frozen=True, kw_only=True)
class AsyncStats:
    """The counters of an `AsyncEncoder`.

    Attributes:
        calls: calls of `encode` that were accepted.
        refused: calls that were refused because the queue was full.
        cancelled: calls that their caller cancelled.
        texts: texts of the accepted calls.
        shared: how many of them joined an equal text that was already waiting or running.
        dropped: texts that were never computed, because all their calls were cancelled while they waited.
        batches: micro-batches passed to the encoder.
        waiting: texts waiting now.
        running: texts in a micro-batch now.
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
    """One call, which collects its results until the last text is done."""

    vectors: Any  # [n, width], or with pooling `tokens` a list of the texts' arrays
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    errors: dict[int, TextError]
    done: asyncio.Future[None]
    missing: int


@dataclass(eq=False)
class _Text:
    """A distinct text that waits or runs, and the calls' positions that its vector goes to."""

    tokens: int
    lane: _Lane
    started: bool = False
    targets: list[tuple[_Call, int]] = field(default_factory=list)


@dataclass(eq=False)
class _Lane:
    """A queue of texts and its micro-batches."""

    batches: int  # at once
    batch_tokens: int  # at which a micro-batch starts without waiting longer
    queue: dict[Item, _Text] = field(default_factory=dict)  # oldest first
    queued_tokens: int = 0
    running: int = 0  # micro-batches
    timer: asyncio.TimerHandle | None = None


class AsyncEncoder:
    """Encodes for many concurrent callers of one event loop. It does not close the encoder below.

    ```python
    async with AsyncEncoder(Encoder.load("bundle")) as encoder:
        vectors = await encoder.encode(["a text"])
    ```

    Args:
        encoder: the encoder. It may be used directly at the same time.
        max_wait_ms: how long a text waits for others while the engine is idle. With 2, a lone caller gets its vector
            2 ms late, and callers within 2 ms of each other share an execution.
        max_batch_tokens: tokens at which a micro-batch starts without waiting longer, estimated from the texts'
            lengths. None: one full batch for each of the engine's streams.
        max_waiting: maximum texts that wait. A call that would exceed it is refused.

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
                "the wait must be at least 0, the others at least 1"
            )
        self._encoder = encoder
        self._wait_s = max_wait_ms / 1000
        self._lane = _Lane(CONCURRENT_BATCHES, max_batch_tokens or TOKEN_BUDGET * encoder.engine.streams)
        self._long_lane = _Lane(1, 1)  # one text at a time
        self._max_waiting = max_waiting
        self._workers = ThreadPoolExecutor(CONCURRENT_BATCHES + 1, thread_name_prefix="mirror-async")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._validate = validator_of(encoder.spec)
        self._texts: dict[Item, _Text] = {}  # waiting and running ones
        self._load = RetryEstimator()  # tokens of all texts
        self._closed = False
        self._idle: asyncio.Future[None] | None = None
        self._counts: Counter[str] = Counter()

    @property
    def stats(self) -> AsyncStats:
        """A snapshot of the counters. The encoder has its own `stats`."""
        return AsyncStats(**self._counts, waiting=self._waiting, running=len(self._texts) - self._waiting)

    async def encode(self, texts: Sequence[Item]) -> Vectors:
        """Encode texts together with those of other callers.

        Cancelling the call drops its texts that have not started and that no other call shares.

        Args:
            texts: a list of strings, or of pairs for a reranker; equal ones, also of other calls, are computed once.

        Returns:
            As `Encoder.encode`, in the texts' order; the array belongs to the caller.

        Raises:
            TextError: the first text that cannot be encoded. Other callers are not affected.
            OverloadedError: too many texts wait already. Raised immediately, and nothing was queued.
            EngineError: the engine failed, or this is closed or belongs to another event loop.
            InputError: `texts` is one string, or the pooling is `tokens`.
        """
        check_text_vectors(self._encoder.spec)
        if not isinstance(texts, (str, bytes)):
            for position, text in enumerate(texts):
                if (error := self._validate(position, text)) is not None:
                    raise error  # before anything is queued
        return (await self.encode_detailed(texts)).vectors_or_raise()

    async def encode_detailed(self, texts: Sequence[object]) -> Encoded:
        """Encode texts together with those of other callers, and report the result of each.

        A bad text does not raise but appears in `errors`. Cancelling works as for `encode`.

        Args:
            texts: a list; equal texts, of this call or of others, are computed once.

        Returns:
            As `Encoder.encode_detailed`; the arrays belong to the caller.

        Raises:
            OverloadedError: too many texts wait already. Raised immediately, and nothing was queued.
            EngineError: the engine failed, or this is closed or belongs to another event loop.
            InputError: `texts` is one string.
        """
        if isinstance(texts, (str, bytes)):
            raise InputError(f"texts is one {type(texts).__name__}: pass a list, such as [text]")
        if self._encoder.cached is None:
            return await self.compute(texts)
        looked_up = self._encoder.cached.look_up(texts)
        return looked_up.complete(await self.compute(looked_up.missing))

    async def compute(self, texts: Sequence[object]) -> Encoded:
        """Do as `encode_detailed`, without the vector cache."""
        loop = self._own_loop()
        count, spec = len(texts), self._encoder.spec
        none = np.zeros((0, width_of(spec)), dtype_of(spec))
        call = _Call(
            vectors=[none] * count if spec.per_token else np.zeros((count, width_of(spec)), dtype_of(spec)),
            tokens=np.zeros(count, np.int64),
            truncated=np.zeros(count, np.bool_),
            errors={i: error for i, text in enumerate(texts) if (error := self._validate(i, text)) is not None},
            done=loop.create_future(),
            missing=0,
        )
        good: dict[int, Item] = {
            i: text if isinstance(text, str) else tuple(text)  # type: ignore[arg-type, misc]
            for i, text in enumerate(texts)
            if i not in call.errors
        }
        call.missing = len(good)
        self._admit(good.values())
        for position, text in good.items():
            self._enqueue(text, call, position)
        if good:
            self._dispatch(self._lane)
            self._dispatch(self._long_lane)
            try:
                await call.done
            except asyncio.CancelledError:
                self._counts["cancelled"] += 1
                self._withdraw(good.values(), call)
                raise
        counts = np.array([len(vectors) for vectors in call.vectors], np.int64) if spec.per_token else None
        return Encoded(
            vectors=np.concatenate([none, *call.vectors]) if spec.per_token else call.vectors,
            tokens=call.tokens,
            truncated=call.truncated,
            errors=call.errors,
            counts=counts,
        )

    async def aclose(self) -> None:
        """Refuse new calls, finish the accepted ones, and release the threads."""
        self._closed = True
        if self._texts:
            self._send(self._lane)
            self._send(self._long_lane)
            if self._idle is None:
                self._idle = self._own_loop().create_future()
            await self._idle
        self._workers.shutdown(wait=False)

    async def __aenter__(self) -> AsyncEncoder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise EngineError("this AsyncEncoder belongs to another event loop: make one for each")
        return loop

    @property
    def _waiting(self) -> int:
        return len(self._lane.queue) + len(self._long_lane.queue)

    def _admit(self, texts: Collection[Item]) -> None:
        """Count a call, or refuse it before anything of it is queued."""
        if self._closed:
            raise EngineError("this AsyncEncoder is closed")
        more = len({text for text in texts if text not in self._texts})
        if more and self._waiting + more > self._max_waiting:
            self._counts["refused"] += 1
            raise OverloadedError(
                f"{self._waiting} texts wait and {more} more would exceed {self._max_waiting}: try again later",
                self._load.retry_after_s(),
            )
        self._counts.update(calls=1, texts=len(texts))

    def _enqueue(self, text: Item, call: _Call, position: int) -> None:
        known = self._texts.get(text)
        if known is None:
            lane = self._long_lane if characters(text) > LONG_CHARACTERS else self._lane
            known = self._texts[text] = lane.queue[text] = _Text(tokens=estimate_tokens(text), lane=lane)
            lane.queued_tokens += known.tokens
            self._load.enter(known.tokens)
        else:
            self._counts["shared"] += 1
        known.targets.append((call, position))

    def _withdraw(self, texts: Collection[Item], call: _Call) -> None:
        """Remove a cancelled call. Texts without another call leave the queue."""
        for text in set(texts):
            known = self._texts.get(text)
            if known is None:
                continue
            known.targets = [target for target in known.targets if target[0] is not call]
            if not known.targets and not known.started:
                del self._texts[text], known.lane.queue[text]
                known.lane.queued_tokens -= known.tokens
                self._load.drop(known.tokens)
                self._counts["dropped"] += 1
        self._settle()

    def _dispatch(self, lane: _Lane) -> None:
        """Start the queued texts, now or when their waiting time ends."""
        if not lane.queue or lane.running >= lane.batches:
            return  # the next micro-batch that ends calls this again
        if lane.queued_tokens >= lane.batch_tokens or not self._wait_s or self._closed:
            self._send(lane)
        elif lane.timer is None and self._loop is not None:
            lane.timer = self._loop.call_later(self._wait_s, self._send, lane)

    def _send(self, lane: _Lane) -> None:
        """Pass micro-batches to the worker threads while there are texts and free threads."""
        if lane.timer is not None:
            lane.timer.cancel()
            lane.timer = None
        while lane.queue and lane.running < lane.batches:
            batch: dict[Item, _Text] = {}
            tokens = 0
            while lane.queue and tokens < lane.batch_tokens:
                text = next(iter(lane.queue))
                batch[text] = waiting = lane.queue.pop(text)
                waiting.started = True
                tokens += waiting.tokens
            lane.queued_tokens -= tokens
            lane.running += 1
            self._counts["batches"] += 1
            self._workers.submit(self._compute, lane, batch)

    def _compute(self, lane: _Lane, batch: dict[Item, _Text]) -> None:
        """Compute one micro-batch in a worker thread."""
        outcomes: list[_Outcome]
        try:
            encoded = self._encoder.finish(self._encoder.begin(list(batch), direct=True))
            found = zip(encoded.by_text(), encoded.tokens.tolist(), encoded.truncated.tolist(), strict=True)
            outcomes = [encoded.errors.get(i, outcome) for i, outcome in enumerate(found)]
        except Exception as error:  # the edge of a thread: every caller must get a result
            outcomes = [error] * len(batch)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, lane, batch, outcomes)

    def _deliver(self, lane: _Lane, batch: dict[Item, _Text], outcomes: Sequence[_Outcome]) -> None:
        """Pass results to their callers, in the event loop."""
        lane.running -= 1
        failed = all(isinstance(outcome, Exception) for outcome in outcomes)
        (self._load.drop if failed else self._load.finish)(sum(known.tokens for known in batch.values()))
        for (text, known), outcome in zip(batch.items(), outcomes, strict=True):
            del self._texts[text]
            for call, position in known.targets:
                if call.done.done():  # cancelled, or failed with another micro-batch
                    continue
                if isinstance(outcome, TextError):
                    call.errors[position] = type(outcome)(position, outcome.reason)
                elif isinstance(outcome, Exception):
                    call.done.set_exception(outcome)
                    continue
                else:
                    call.vectors[position], call.tokens[position], call.truncated[position] = outcome
                call.missing -= 1
                if not call.missing:
                    call.done.set_result(None)
        self._settle()
        self._dispatch(lane)

    def _settle(self) -> None:
        if self._idle is not None and not self._texts and not self._idle.done():
            self._idle.set_result(None)
