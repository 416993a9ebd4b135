"""Closed and open loops of one event loop. Times in an open loop count from the moment a request was due."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.requests import REFUSALS, ExpectedVectors, Kind, Request, RequestSource
from benchmarks.load.targets import GatewayTarget, Target
from benchmarks.load.window import Outcome, Window
from mirror_runtime.client.protocol import Rejected
from mirror_runtime.errors import DeadlineExceededError, InputError, OverloadedError, ServerError, UnavailableError

RECOVERY_S = 30.0
"""A server that is still slow after this has not recovered."""

REFUSED_PAUSE_S = 0.01
"""Pause of a closed loop's caller after an overloaded server refused its request."""

MOST_UNDER_WAY = 1000
"""Requests of an open loop. A server that has stopped answering must not fill the generator's memory."""

CANCEL_WITHIN_S = 0.02
"""A request of 32 texts mostly takes longer, so it is cancelled while it waits or while it is computed."""

_OUTCOMES = (
    (OverloadedError, Outcome.OVERLOADED),
    (UnavailableError, Outcome.UNAVAILABLE),
    (DeadlineExceededError, Outcome.LATE),
    ((Rejected, InputError), Outcome.GOOD_REFUSED),
    (ServerError, Outcome.FAILED),
)
"""Subclasses before their bases."""

End = tuple[Outcome, str]
"""How a request ended, and the error's text."""

Send = Callable[[Request, float], Awaitable[End]]
"""Sends a request. A request of the kind `CANCELLED` is cancelled after that many seconds."""


class Sender:
    """Sends requests to their targets, and compares the answers unless `expected` is None."""

    def __init__(self, targets: Mapping[str, Target], texts: Sequence[str], expected: ExpectedVectors | None) -> None:
        self._targets, self._texts, self._expected = targets, texts, expected

    async def send(self, request: Request, cancel_after_s: float = 0.0) -> End:
        """Send a request and return how it ended. Never raises."""
        try:
            if request.kind is Kind.GOOD:
                return await self._good(request)
            if request.kind is Kind.CANCELLED:
                try:
                    return await asyncio.wait_for(self._good(request), cancel_after_s)
                except asyncio.TimeoutError:
                    return Outcome.CANCELLED, ""
            return await self._bad(request)
        except Exception as error:
            # The edge of a caller: whatever a library raises is a finding, and the load goes on.
            outcomes = (outcome for kind, outcome in _OUTCOMES if isinstance(error, kind))
            return next(outcomes, Outcome.CRASHED), _shown(error)

    async def _good(self, request: Request) -> End:
        vectors = await self._targets[request.target].encode([self._texts[at] for at in request.chosen])
        problem = "" if self._expected is None else self._expected.problem(request.chosen, vectors)
        return (Outcome.WRONG_VECTOR if problem else Outcome.ANSWERED), problem

    async def _bad(self, request: Request) -> End:
        texts = [self._texts[at].encode() for at in request.chosen]
        if request.kind is Kind.BAD_UTF8:
            texts[-1] += b" \xff"
        target = self._targets[request.target]
        assert not isinstance(target, GatewayTarget)
        try:
            await target.submit(texts, {"normalise": True} if request.kind is Kind.UNKNOWN_PARAMETER else {})
        except Rejected as error:
            right = REFUSALS[request.kind] in error.reason
            return (Outcome.REFUSED if right else Outcome.OTHER_REFUSAL), _shown(error)
        return Outcome.NOT_REFUSED, request.kind.value


def arrivals(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Draw `rate * seconds` moments, at least one, of a Poisson process: in seconds, in order."""
    return np.sort(np.random.default_rng(seed).uniform(0, seconds, size=max(1, round(rate * seconds))))


async def closed_loop(send: Send, source: RequestSource, *, callers: int, seconds: float) -> Window:
    """Run callers that send one request after the other for some seconds.

    Each caller first sends one request that is not counted. A request under way at the end is waited for and counted,
    and so is its time. The loop ends at once when the first request fails, as then probably nothing works.
    """
    window, broken = Window(), False
    streams = [source.stream(caller, callers) for caller in range(callers)]
    await asyncio.gather(*(send(next(stream), 0.0) for stream in streams))
    began, cpu_began = time.perf_counter(), time.process_time()

    async def call(stream: Iterator[Request]) -> None:
        nonlocal broken
        while not broken and (sent := time.perf_counter()) < began + seconds:
            request = next(stream)
            outcome, reason = await send(request, 0.0)
            now = time.perf_counter()
            if outcome is Outcome.ANSWERED:
                window.answer(request.label, 1e3 * (now - sent), now - began)
                continue
            window.end(outcome, now - began, reason)
            if outcome is Outcome.OVERLOADED:  # long texts: the callers alone have more than the server accepts at once
                await asyncio.sleep(REFUSED_PAUSE_S)
            elif not window.answered_ms:
                broken = True

    await asyncio.gather(*(call(stream) for stream in streams))
    window.at_s = window.seconds = window.last_answer_s
    window.cpu_s = time.process_time() - cpu_began
    return window


class OpenLoop:
    """Requests at random moments (Poisson, `rate` per second), whether or not earlier ones are answered."""

    def __init__(self, send: Send, source: RequestSource, *, rate: float, seconds: float, seed: int) -> None:
        self._send, self._source, self._seconds = send, source, seconds
        self._due = arrivals(rate, seconds, seed)
        self._random = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()
        self._window, self._complete = Window(), False
        self._began = time.perf_counter()
        self._window_began_s, self._cpu_began_s = 0.0, time.process_time()

    async def run(self, recovery: Callable[[], Awaitable[None]] | None = None) -> None:
        """Send every request when it is due, await `recovery`, then those under way; if cancelled, cancel those too."""
        self._began = time.perf_counter()
        try:
            for due in self._due:
                # Also when it is late: the event loop must get to read answers.
                await asyncio.sleep(max(0.0, due - self._clock()))
                self._start(float(due))
            await asyncio.sleep(0)  # lets the last one be sent
            if recovery is not None:
                await recovery()
            await asyncio.gather(*self._under_way)
            self._complete = True
        finally:
            left = list(self._under_way)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def take(self) -> Window:
        """Return what ended since the last call; once all have ended, up to the last request due or the last answer."""
        window, cpu_s = self._window, time.process_time()
        window.at_s = max(self._seconds, window.last_answer_s) if self._complete else self._clock()
        window.seconds, window.cpu_s = window.at_s - self._window_began_s, cpu_s - self._cpu_began_s
        self._window, self._window_began_s, self._cpu_began_s = Window(), window.at_s, cpu_s
        return window

    def _clock(self) -> float:
        return time.perf_counter() - self._began

    def _start(self, due: float) -> None:
        if len(self._under_way) >= MOST_UNDER_WAY:
            self._window.end(Outcome.UNSENT, self._clock(), f"{MOST_UNDER_WAY} requests were under way")
            return
        cancel_after_s = self._random.uniform(0, CANCEL_WITHIN_S)
        task = asyncio.ensure_future(self._request(self._source.draw(), due, cancel_after_s))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _request(self, request: Request, due: float, cancel_after_s: float) -> None:
        self._window.lag_ms.append(1e3 * (self._clock() - due))
        outcome, reason = await self._send(request, cancel_after_s)
        now = self._clock()
        if outcome is Outcome.ANSWERED:
            self._window.answer(request.label, 1e3 * (now - due), now)
            return
        if outcome is Outcome.OVERLOADED:
            self._window.refused_ms.append(1e3 * (now - due))
        self._window.end(outcome, now, f"{request.label}: {reason}")


async def recovery_time(send: Send, source: RequestSource, within_ms: float) -> float | None:
    """Send one request after the other until one is answered within `within_ms`, and return the seconds until then.

    None if no request was within `RECOVERY_S`.
    """
    began, stream = time.perf_counter(), source.stream(0, 1)
    while (sent := time.perf_counter()) < began + RECOVERY_S:
        outcome, _ = await send(next(stream), 0.0)
        now = time.perf_counter()
        if outcome is not Outcome.ANSWERED:
            await asyncio.sleep(REFUSED_PAUSE_S)
        elif 1e3 * (now - sent) <= within_ms:
            return now - began
    return None


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
