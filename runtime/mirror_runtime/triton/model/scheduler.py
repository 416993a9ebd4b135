"""A queue of accepted requests, and workers that answer what waits in it together, whoever sent it.

While there is little to do, the calling thread computes requests itself: replies that return with the call that brought
the requests cost Triton half of what later replies cost. As soon as there is more, all requests go to the workers, so
that the calling thread can reject immediately those that do not fit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import OverloadedError
from mirror_runtime.retry_after import RetryEstimator
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model.batching import (
    LARGEST_REQUEST,
    EmbedRequest,
    EmbedResult,
    Failure,
    FailureKind,
    embed,
)

_log = logging.getLogger(__name__)

Outcome: TypeAlias = "EmbedResult | Failure"

INLINE_TOKENS = 512
"""Estimated tokens in flight, for each stream of the engine, up to which the calling thread computes requests itself.
Meanwhile it rejects none: for some 30 ms, with a small encoder on one core."""

CHECK_CANCELLED_AFTER_S = 0.05
"""How long a request waits before its cancellation is checked; the check costs as much as a short text."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request and how to reply to it."""

    request: EmbedRequest
    reply: Callable[[Outcome], None]  # receives the outcome; called once, from a worker's thread
    is_cancelled: Callable[[], bool]  # slow
    timeout_s: float | None = None  # from its arrival, until the reply becomes useless; None for never


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    job: Job
    tokens: int
    since: float


class TokenBudget:
    """Counts the tokens of accepted requests that are not answered yet. Safe to use from several threads.

    With nothing in flight a request of any size is accepted, so that a large one is not rejected for ever.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._work = RetryEstimator(clock)

    @property
    def in_flight(self) -> int:
        """Tokens in flight now."""
        return self._work.in_flight

    def acquire(self, tokens: int) -> None:
        """Accept a request, or raise an `OverloadedError` with the time when it might fit."""
        with self._lock:
            in_flight = self._work.in_flight
            if in_flight and in_flight + tokens > self.limit:
                retry_after_s = self._work.retry_after_s()
                raise OverloadedError(
                    f"overloaded: {in_flight} tokens are in flight and {tokens} more would exceed {self.limit}; "
                    f"retry after {round(1000 * retry_after_s)} ms",
                    retry_after_s,
                )
            self._work.enter(tokens)

    def release(self, tokens: int) -> None:
        """Release the tokens of an answered request."""
        with self._lock:
            self._work.finish(tokens)


class Scheduler:
    """Accepts or rejects requests; its workers answer the accepted ones. `close` finishes them.

    A worker stops filling a batch at `batch_tokens` estimated tokens. While one worker waits for the engine, another
    tokenises or replies.
    """

    def __init__(
        self, encoder: Encoder, budget: TokenBudget, *, long_texts: LongTexts, batch_tokens: int, workers: int
    ) -> None:
        self._encoder = encoder
        self._budget = budget
        self._long_texts = long_texts
        self._batch_tokens = batch_tokens
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._work, name=f"mirror-scheduler-{n}") for n in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests so far by outcome: admitted, refused; of the admitted ones: expired, cancelled, failed."""
        with self._changed:
            return dict(self._counts)

    def submit(self, jobs: Sequence[Job]) -> list[Outcome | None]:
        """Submit requests that arrived together: return each one's outcome, or None where `job.reply` will be called.

        If they and the requests in flight are small, they are computed here. Otherwise each is accepted or rejected,
        which takes no time.
        """
        now = time.monotonic()
        max_tokens = self._encoder.spec.max_tokens
        waiting = [_Waiting(job=job, tokens=job.request.estimated_tokens(max_tokens), since=now) for job in jobs]
        tokens = sum(each.tokens for each in waiting)
        if self._budget.in_flight + tokens > min(INLINE_TOKENS * self._encoder.engine.streams, self._budget.limit):
            return [self._enqueue(each) for each in waiting]
        self._budget.acquire(tokens)
        self._count("admitted", len(jobs))
        try:
            return list(self._compute(waiting))
        finally:
            self._budget.release(tokens)

    def close(self) -> None:
        """Answer the accepted requests, and end the workers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _enqueue(self, waiting: _Waiting) -> Failure | None:
        size = sum(waiting.job.request.sizes)
        if size > LARGEST_REQUEST:
            message = f"the request has {size} bytes of text: send at most {LARGEST_REQUEST} in one"
            return Failure(kind=FailureKind.INVALID_ARG, message=message)
        try:
            self._budget.acquire(waiting.tokens)
        except OverloadedError as error:
            self._count("refused")
            return Failure(kind=FailureKind.UNAVAILABLE, message=str(error))
        with self._changed:
            self._counts["admitted"] += 1
            self._queue.append(waiting)
            self._changed.notify()
        return None

    def _work(self) -> None:
        while batch := self._next_batch():
            live = [waiting for waiting in batch if self._is_live(waiting)]
            for waiting, outcome in zip(live, self._compute(live), strict=True):
                self._settle(waiting, outcome)

    def _next_batch(self) -> list[_Waiting]:
        """Wait for requests and take a batch of them; empty after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            batch: list[_Waiting] = []
            tokens = 0
            while self._queue and (not batch or tokens + self._queue[0].tokens <= self._batch_tokens):
                batch.append(self._queue.popleft())
                tokens += batch[-1].tokens
            return batch

    def _is_live(self, waiting: _Waiting) -> bool:
        """Settle a request that has expired or was cancelled; return whether it is to be computed."""
        waited = time.monotonic() - waiting.since
        job = waiting.job
        if job.timeout_s is not None and waited > job.timeout_s:
            message = f"the request's timeout of {round(1e6 * job.timeout_s)} µs was over before work on it began"
            self._count("expired")
            self._settle(waiting, Failure(kind=FailureKind.UNAVAILABLE, message=message))
            return False
        if waited > CHECK_CANCELLED_AFTER_S and job.is_cancelled():
            self._count("cancelled")
            self._settle(waiting, Failure(kind=FailureKind.CANCELLED, message="cancelled before work on it began"))
            return False
        return True

    def _compute(self, batch: Sequence[_Waiting]) -> Sequence[Outcome]:
        if not batch:
            return []
        try:
            return embed(self._encoder, [waiting.job.request for waiting in batch], self._long_texts)
        except Exception:
            # The outermost call of a thread: whatever happened, each caller gets a reply and the log gets the reason.
            _log.exception("a batch of %d requests failed", len(batch))
            self._count("failed", len(batch))
            message = "encoding failed; the server's log says why"
            return [Failure(kind=FailureKind.INTERNAL, message=message)] * len(batch)

    def _settle(self, waiting: _Waiting, outcome: Outcome) -> None:
        # Release first: a caller that has its reply may send the next request.
        self._budget.release(waiting.tokens)
        try:
            waiting.job.reply(outcome)
        except Exception:
            _log.exception("a reply could not be sent")

    def _count(self, outcome: str, times: int = 1) -> None:
        with self._changed:
            self._counts[outcome] += times
