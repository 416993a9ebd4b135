"""Requests that were taken wait here; workers gather what waits, whoever sent it, and answer it together.

The thread that brings requests computes them itself while there is little to do: answers that go back with the call
that brought their requests cost Triton half of what others do. As soon as there is more it leaves all of it to the
workers, so that it can refuse at once whatever does not fit.
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
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model.batching import (
    LARGEST_REQUEST,
    EmbedRequest,
    EmbedResult,
    Failure,
    FailureKind,
    answer,
)
from mirror_runtime.triton.model.token_budget import TokenBudget

_log = logging.getLogger(__name__)

Outcome: TypeAlias = "EmbedResult | Failure"

AT_ONCE_TOKENS = 512
"""Guessed tokens in flight, for each of the engine's streams, up to which the thread that brings requests computes
them itself. It refuses nobody meanwhile: for some 30 ms, with a small encoder on one core."""

ASK_AFTER_S = 0.05
"""A request that has waited this long is asked whether its caller has gone; asking costs as much as a short text."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request on its way.

    Attributes:
        question: what is asked.
        reply: takes the outcome; called once, from a worker's thread.
        is_cancelled: whether the caller has given up; slow to ask.
        timeout_s: seconds after its arrival at which the answer is of no use any more; None for never.
    """

    question: EmbedRequest
    reply: Callable[[Outcome], None]
    is_cancelled: Callable[[], bool]
    timeout_s: float | None = None


@dataclass(frozen=True)
class _Waiting:
    job: Job
    tokens: int
    since: float


class Scheduler:
    """Takes requests or refuses them, and has workers answer what was taken. Close it to finish what was taken.

    Args:
        encoder: what turns texts into vectors; its owner closes it.
        gate: bounds what is in flight.
        long_texts: the policy where a request names none.
        batch_tokens: guessed tokens after which a worker takes no more requests at once.
        workers: threads: while one waits for the engine, another tokenises or sends.
    """

    def __init__(
        self, encoder: Encoder, gate: TokenBudget, *, long_texts: LongTexts, batch_tokens: int, workers: int
    ) -> None:
        self._encoder = encoder
        self._gate = gate
        self._long_texts = long_texts
        self._batch_tokens = batch_tokens
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._work, name=f"mirror-desk-{n}") for n in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests so far by what became of them: admitted, refused; of the admitted, expired, cancelled, failed."""
        with self._changed:
            return dict(self._counts)

    def offer(self, jobs: Sequence[Job]) -> list[Outcome | None]:
        """Offer requests that came together.

        While they and what is in flight are little, they are answered here and now. Otherwise each is taken or
        refused, which takes no time.

        Returns:
            For each its answer, or why it was refused; None where it was taken: `job.reply` will be called.
        """
        now = time.monotonic()
        waiting = [_Waiting(job, job.question.tokens(self._encoder.spec.max_tokens), now) for job in jobs]
        tokens = sum(each.tokens for each in waiting)
        if self._gate.in_flight + tokens > min(AT_ONCE_TOKENS * self._encoder.engine.streams, self._gate.limit):
            return [self._take(each) for each in waiting]
        self._gate.enter(tokens)
        self._count("admitted", len(jobs))
        try:
            return list(self._outcomes(waiting))
        finally:
            self._gate.leave(tokens)

    def _take(self, waiting: _Waiting) -> Failure | None:
        size = sum(waiting.job.question.sizes)
        if size > LARGEST_REQUEST:
            message = f"the request has {size} bytes of text: send at most {LARGEST_REQUEST} in one"
            return Failure(kind=FailureKind.INVALID_ARG, message=message)
        try:
            self._gate.enter(waiting.tokens)
        except OverloadedError as error:
            self._count("refused")
            return Failure(kind=FailureKind.UNAVAILABLE, message=str(error))
        with self._changed:
            self._counts["admitted"] += 1
            self._queue.append(waiting)
            self._changed.notify()
        return None

    def close(self) -> None:
        """Answer what was taken, and end the workers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while batch := self._next():
            wanted = [waiting for waiting in batch if self._still_wanted(waiting)]
            for waiting, outcome in zip(wanted, self._outcomes(wanted), strict=True):
                self._settle(waiting, outcome)

    def _next(self) -> list[_Waiting]:
        """Wait for requests and take those that make a batch; none when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            batch: list[_Waiting] = []
            tokens = 0
            while self._queue and (not batch or tokens + self._queue[0].tokens <= self._batch_tokens):
                batch.append(self._queue.popleft())
                tokens += batch[-1].tokens
            return batch

    def _still_wanted(self, waiting: _Waiting) -> bool:
        """Settle a request whose time is over or whose caller has gone; tell whether it is to be computed."""
        waited = time.monotonic() - waiting.since
        job = waiting.job
        if job.timeout_s is not None and waited > job.timeout_s:
            message = f"the request's timeout of {round(1e6 * job.timeout_s)} µs was over before work on it began"
            self._count("expired")
            self._settle(waiting, Failure(kind=FailureKind.UNAVAILABLE, message=message))
            return False
        if waited > ASK_AFTER_S and job.is_cancelled():
            self._count("cancelled")
            self._settle(waiting, Failure(kind=FailureKind.CANCELLED, message="cancelled before work on it began"))
            return False
        return True

    def _outcomes(self, batch: Sequence[_Waiting]) -> Sequence[Outcome]:
        if not batch:
            return []
        try:
            return answer(self._encoder, [waiting.job.question for waiting in batch], self._long_texts)
        except Exception:
            # The edge of a thread: whatever happened, each waiter gets an answer and the log gets the reason.
            _log.exception("a batch of %d requests failed", len(batch))
            self._count("failed", len(batch))
            message = "encoding failed; the server's log says why"
            return [Failure(kind=FailureKind.INTERNAL, message=message)] * len(batch)

    def _settle(self, waiting: _Waiting, outcome: Outcome) -> None:
        # First the room, then the answer: who has it may ask again.
        self._gate.leave(waiting.tokens)
        try:
            waiting.job.reply(outcome)
        except Exception:
            _log.exception("an answer could not be sent")

    def _count(self, what: str, times: int = 1) -> None:
        with self._changed:
            self._counts[what] += times
