"""Queues of accepted requests, and workers that answer what waits in them together, whoever sent it.

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
from dataclasses import dataclass, field
from typing import TypeAlias

from mirror_runtime.bulk_room import SLICE_TOKENS, BulkRoom
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
    joined,
)

_log = logging.getLogger(__name__)

Outcome: TypeAlias = "EmbedResult | Failure"

INLINE_TOKENS = 512
"""Estimated tokens in flight, for each stream of the engine, up to which the calling thread computes requests itself.
Meanwhile it rejects none: for some 30 ms, with a small encoder on one core."""

CHECK_CANCELLED_AFTER_S = 0.05
"""How long a request waits before its cancellation is checked; the check costs as much as a short text."""

_POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request and how to reply to it."""

    request: EmbedRequest
    reply: Callable[[Outcome], None]  # receives the outcome; called once, from a worker's thread
    is_cancelled: Callable[[], bool]  # slow
    timeout_s: float | None = None  # from its arrival, until the reply becomes useless; None for never


@dataclass(kw_only=True)
class _Waiting:
    """An accepted request, whose slices workers take one by one."""

    job: Job
    tokens: int
    since: float
    slices: Sequence[EmbedRequest]
    costs: Sequence[int]  # tokens of each slice
    large: bool
    taken: int = 0  # slices
    results: dict[int, EmbedResult] = field(default_factory=dict)  # of slices, by number
    settled: bool = False


class TokenBudget:
    """Counts the tokens of accepted requests that are not answered yet. Safe to use from several threads.

    Large requests have a budget of their own, so that they leave room for small ones. With none of its kind in flight a
    request of any size is accepted, so that a large one is not rejected for ever.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._closed = False
        self._lock = threading.Lock()
        self._work = {large: RetryEstimator(clock) for large in (False, True)}

    @property
    def in_flight(self) -> int:
        """Tokens in flight now."""
        return sum(work.in_flight for work in self._work.values())

    @property
    def large_rate(self) -> float:
        """Tokens of large requests that are answered in a busy second, lately."""
        return self._work[True].rate

    def acquire(self, tokens: int, *, large: bool = False) -> None:
        """Accept a request, or raise an `OverloadedError`; it has the time when the request might fit."""
        with self._lock:
            if self._closed:
                raise OverloadedError("the server is stopping: try again")
            work = self._work[large]
            if work.in_flight and work.in_flight + tokens > self.limit:
                retry_after_s = work.retry_after_s()
                raise OverloadedError(
                    f"overloaded: {work.in_flight} tokens are in flight and {tokens} more would exceed {self.limit}; "
                    f"retry after {round(1000 * retry_after_s)} ms",
                    retry_after_s,
                )
            work.enter(tokens)

    def close(self) -> None:
        """Accept no more requests."""
        with self._lock:
            self._closed = True

    def release(self, tokens: int, *, large: bool = False) -> None:
        """Release the tokens of an answered request."""
        with self._lock:
            self._work[large].finish(tokens)


class Scheduler:
    """Accepts or rejects requests; its workers answer the accepted ones. `close` finishes them.

    Requests of more than `SLICE_TOKENS` are large and computed in slices, as in the gateway: while small requests come,
    one slice or a moment's work of large ones is under way, so that neither kind waits for all of the other. One
    worker takes no large ones. While one waits for the engine, another tokenises or replies.

    A worker computes what it takes at once: of large requests a full run of the engine, by estimated tokens, and of
    small ones a full run for each of its streams.
    """

    def __init__(self, encoder: Encoder, budget: TokenBudget, long_texts: LongTexts) -> None:
        self.encoder = encoder
        self.budget = budget
        self._long_texts = long_texts
        workers, self._run_tokens = encoder.engine.streams + 1, encoder.decision.batch_tokens
        self._batch_tokens = encoder.engine.streams * self._run_tokens
        self._small: deque[_Waiting] = deque()
        self._large: deque[_Waiting] = deque()
        self._bulk_room = BulkRoom()
        self._on_large = self._large_running = 0  # workers, and the tokens that they compute
        self._most_on_large = max(1, workers - 1)
        self._changed = threading.Condition()
        self._closed = False
        self._unsent = 0  # replies of queued requests
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
        max_tokens = self.encoder.spec.max_tokens
        sizes = [job.request.estimated_tokens(max_tokens) for job in jobs]
        if any(size <= SLICE_TOKENS and not job.request.is_probe for job, size in zip(jobs, sizes, strict=True)):
            self._bulk_room.note_small()
        tokens = sum(sizes)
        if self.budget.in_flight + tokens > min(INLINE_TOKENS * self.encoder.engine.streams, self.budget.limit):
            return [self._enqueue(job, size, now) for job, size in zip(jobs, sizes, strict=True)]
        try:
            self.budget.acquire(tokens)
        except OverloadedError as error:  # it fits: the server is stopping
            return [self._refused(error) for _ in jobs]
        self._count("admitted", len(jobs))
        try:
            return list(self._compute([job.request for job in jobs]))
        finally:
            self.budget.release(tokens)

    def drain(self) -> None:
        """Reject new requests from now on, and return when the accepted ones are answered."""
        self.budget.close()
        while self.budget.in_flight or self._unsent:  # in this order: a request is queued before its tokens are gone
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Answer the accepted requests, and end the workers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _enqueue(self, job: Job, tokens: int, now: float) -> Failure | None:
        size = sum(job.request.sizes)
        if size > LARGEST_REQUEST:
            message = f"the request has {size} bytes of text: send at most {LARGEST_REQUEST} in one"
            return Failure(kind=FailureKind.INVALID_ARG, message=message)
        large = tokens > SLICE_TOKENS
        try:
            self.budget.acquire(tokens, large=large)
        except OverloadedError as error:
            return self._refused(error)
        max_tokens = self.encoder.spec.max_tokens
        slices = job.request.slices(max_tokens, SLICE_TOKENS) if large else [job.request]
        costs = [one.estimated_tokens(max_tokens) for one in slices] if large else [tokens]
        waiting = _Waiting(job=job, tokens=tokens, since=now, slices=slices, costs=costs, large=large)
        with self._changed:
            self._counts["admitted"] += 1
            self._unsent += 1
            (self._large if large else self._small).append(waiting)
            self._changed.notify()
        return None

    def _refused(self, error: OverloadedError) -> Failure:
        self._count("refused")
        return Failure(kind=FailureKind.UNAVAILABLE, message=str(error))

    def _work(self) -> None:
        while batch := self._next_batch():
            live = [(waiting, number) for waiting, number in batch if self._is_live(waiting)]
            outcomes = self._compute([waiting.slices[number] for waiting, number in live])
            for (waiting, number), outcome in zip(live, outcomes, strict=True):
                self._keep(waiting, number, outcome)
            if batch[0][0].large:
                with self._changed:
                    self._on_large -= 1
                    self._large_running -= sum(waiting.costs[number] for waiting, number in batch)
                    self._changed.notify()

    def _next_batch(self) -> list[tuple[_Waiting, int]]:
        """Wait for requests and take a batch of large ones' slices, or of small ones; empty after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._small or self._large_fits() or self._closed)
            batch: list[tuple[_Waiting, int]] = []
            tokens = 0
            while self._large_fits(tokens):
                waiting = self._large[0]
                batch.append((waiting, waiting.taken))
                tokens += waiting.costs[waiting.taken]
                waiting.taken += 1
                if waiting.taken == len(waiting.slices):
                    self._large.popleft()
            if batch:
                if self._large and self._large[0] is batch[-1][0]:
                    self._large.rotate(-1)  # several requests take turns, though not in the middle of a batch
                self._on_large += 1
                self._large_running += tokens
                self._changed.notify()  # there may be another slice
                return batch
            while self._small and (not batch or tokens + self._small[0].tokens <= self._batch_tokens):
                waiting = self._small.popleft()
                batch.append((waiting, 0))
                tokens += waiting.tokens
            return batch

    def _large_fits(self, taken: int = 0) -> bool:
        """Return whether this worker may take a large request's slice besides `taken` tokens; forget failed ones."""
        while self._large and self._large[0].settled:
            self._large.popleft()
        if not self._large or self._on_large >= self._most_on_large:
            return False
        cost = self._large[0].costs[self._large[0].taken]
        running = self._large_running + taken
        most = self._run_tokens * self._most_on_large
        room = self._bulk_room.tokens(most, SLICE_TOKENS, self.budget.large_rate)
        return not running or (running + cost <= room and (not taken or taken + cost <= self._run_tokens))

    def _is_live(self, waiting: _Waiting) -> bool:
        """Settle a request that has expired or was cancelled; return whether it is to be computed."""
        waited = time.monotonic() - waiting.since
        job = waiting.job
        if waiting.settled:
            return False
        if job.timeout_s is not None and waited > job.timeout_s:
            point = "ended" if waiting.results else "began"
            message = f"the request's timeout of {round(1e6 * job.timeout_s)} µs was over before work on it {point}"
            self._settle(waiting, Failure(kind=FailureKind.UNAVAILABLE, message=message), "expired")
            return False
        if waited > CHECK_CANCELLED_AFTER_S and job.is_cancelled():
            failure = Failure(kind=FailureKind.CANCELLED, message="cancelled before work on it ended")
            self._settle(waiting, failure, "cancelled")
            return False
        return True

    def _compute(self, batch: Sequence[EmbedRequest]) -> Sequence[Outcome]:
        if not batch:
            return []
        try:
            return embed(self.encoder, batch, self._long_texts)
        except Exception:
            # The outermost call of a thread: whatever happened, each caller gets a reply and the log gets the reason.
            _log.exception("a batch of %d requests failed", len(batch))
            self._count("failed", len(batch))
            message = "encoding failed; the server's log says why"
            return [Failure(kind=FailureKind.INTERNAL, message=message)] * len(batch)

    def _keep(self, waiting: _Waiting, number: int, outcome: Outcome) -> None:
        """Keep the outcome of a slice; a failure or the last one settles the request."""
        if isinstance(outcome, Failure):
            self._settle(waiting, outcome)
            return
        with self._changed:
            waiting.results[number] = outcome
            complete = len(waiting.results) == len(waiting.slices)
        if complete:
            self._settle(waiting, joined([waiting.results[n] for n in range(len(waiting.slices))]))

    def _settle(self, waiting: _Waiting, outcome: Outcome, count: str = "") -> None:
        with self._changed:
            if waiting.settled:  # another slice has failed
                return
            waiting.settled = True
            self._counts.update([count] if count else [])
        # Release first: a caller that has its reply may send the next request.
        self.budget.release(waiting.tokens, large=waiting.large)
        try:
            waiting.job.reply(outcome)
        except Exception:
            _log.exception("a reply could not be sent")
        finally:
            with self._changed:
                self._unsent -= 1

    def _count(self, outcome: str, times: int = 1) -> None:
        with self._changed:
            self._counts[outcome] += times
