"""Closed and open loops of one event loop. Times in an open loop count from the moment a request was due."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.requests import REFUSALS, ExpectedVectors, Kind, Request, RequestSource
from benchmarks.load.targets import Target, UncheckedTarget
from benchmarks.load.window import Outcome, Tally, Window
from mirror_runtime.client.protocol import Parameters, Rejected
from mirror_runtime.errors import (
    DeadlineExceededError,
    InputError,
    MirrorError,
    OverloadedError,
    ServerError,
    UnavailableError,
)

RECOVERY_S = 30.0
"""A server that is still slow after this has not recovered."""

REFUSED_PAUSE_S = 0.01
"""Pause of a closed loop's caller after an overloaded server refused its request."""

MOST_UNDER_WAY = 1000
"""Requests of an open loop. A server that has stopped answering must not fill the generator's memory."""

CANCEL_WITHIN_S = 0.02
"""A request of 32 texts mostly takes longer, so it is cancelled while it waits or while it is computed."""

_OUTCOMES: tuple[tuple[type[MirrorError], Outcome], ...] = (
    (OverloadedError, Outcome.OVERLOADED),
    (UnavailableError, Outcome.UNAVAILABLE),
    (DeadlineExceededError, Outcome.LATE),
    (Rejected, Outcome.GOOD_REFUSED),
    (InputError, Outcome.GOOD_REFUSED),
    (ServerError, Outcome.FAILED),
)
"""Subclasses before their bases."""

End = tuple[Outcome, str]
"""How a request ended, and the error's text."""

Send = Callable[[Request, float], Awaitable[End]]
"""Sends a request. A request of the kind `CANCELLED` is cancelled after that many seconds."""


class Sender:
    """Sends requests to their targets and judges the answers.

    Args:
        targets: by name.
        texts: that requests choose from.
        expected: right vectors of the texts; None where answers are not compared.
    """

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
        except MirrorError as error:
            outcomes = (outcome for kind, outcome in _OUTCOMES if isinstance(error, kind))
            return next(outcomes, Outcome.CRASHED), _shown(error)
        except Exception as error:
            # The edge of a caller: whatever a library raises is a finding, and the load goes on.
            return Outcome.CRASHED, _shown(error)

    async def _good(self, request: Request) -> End:
        vectors = await self._targets[request.target].encode([self._texts[at] for at in request.chosen])
        problem = "" if self._expected is None else self._expected.problem(request.chosen, vectors)
        return (Outcome.WRONG_VECTOR if problem else Outcome.ANSWERED), problem

    async def _bad(self, request: Request) -> End:
        texts = [self._texts[at].encode() for at in request.chosen]
        parameters: Parameters = {}
        if request.kind is Kind.BAD_UTF8:
            texts[-1] += b" \xff"
        if request.kind is Kind.UNKNOWN_PARAMETER:
            parameters = {"normalise": True}
        target = self._targets[request.target]
        assert isinstance(target, UncheckedTarget)
        try:
            await target.submit(texts, parameters)
        except Rejected as error:
            right = REFUSALS[request.kind] in error.reason
            return (Outcome.REFUSED if right else Outcome.OTHER_REFUSAL), _shown(error)
        return Outcome.NOT_REFUSED, request.kind.value


def arrivals(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Draw the moments, in seconds and in order, of a Poisson process whose number of arrivals is known.

    Every seed draws `rate * seconds` moments, at least one.
    """
    return np.sort(np.random.default_rng(seed).uniform(0, seconds, size=max(1, round(rate * seconds))))


async def closed_loop(send: Send, source: RequestSource, *, callers: int, seconds: float) -> Window:
    """Run callers that send one request after the other for some seconds.

    Each caller first sends one request that is not counted. A request under way at the end is waited for and counted,
    and so is its time. The loop ends at once when the first request fails, as then probably nothing works.

    Args:
        send: sends a request.
        source: of the requests.
        callers: requests under way at once.
        seconds: for how long requests are started.
    """
    tally, broken = Tally(), False
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
                tally.answered(request.label, 1e3 * (now - sent), now - began)
                continue
            tally.ended(outcome, now - began, reason)
            if outcome is Outcome.OVERLOADED:  # long texts: the callers alone have more than the server accepts at once
                await asyncio.sleep(REFUSED_PAUSE_S)
            elif not tally.answered_ms:
                broken = True

    await asyncio.gather(*(call(stream) for stream in streams))
    return tally.window(0.0, tally.last_answer_s, time.process_time() - cpu_began)


class OpenLoop:
    """Requests at random moments (Poisson), whether or not earlier ones are answered.

    Args:
        send: sends a request.
        source: of the requests.
        rate: requests per second.
        seconds: for how long requests are due.
        seed: of the moments.
    """

    def __init__(self, send: Send, source: RequestSource, *, rate: float, seconds: float, seed: int) -> None:
        self._send, self._source, self._seconds = send, source, seconds
        self._due = arrivals(rate, seconds, seed)
        self._random = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()
        self._tally = Tally()
        self._began = time.perf_counter()
        self._window_began_s, self._cpu_began_s = 0.0, time.process_time()

    async def run(self, recovery: Callable[[], Awaitable[None]] | None = None) -> None:
        """Send every request when it is due, then wait for those under way; if cancelled, cancel those too.

        Args:
            recovery: awaited as soon as the last request is sent.
        """
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
        finally:
            left = list(self._under_way)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def take(self) -> Window:
        """Return what ended since the last call."""
        at_s, cpu_s = self._clock(), time.process_time()
        window = self._tally.window(self._window_began_s, at_s, cpu_s - self._cpu_began_s)
        self._tally, self._window_began_s, self._cpu_began_s = Tally(), at_s, cpu_s
        return window

    def whole(self) -> Window:
        """Return everything that ended, as one window up to the last request due or the last answer."""
        at_s = max(self._seconds, self._tally.last_answer_s)
        return self._tally.window(0.0, at_s, time.process_time() - self._cpu_began_s)

    def _clock(self) -> float:
        return time.perf_counter() - self._began

    def _start(self, due: float) -> None:
        if len(self._under_way) >= MOST_UNDER_WAY:
            self._tally.ended(Outcome.UNSENT, self._clock(), f"{MOST_UNDER_WAY} requests were under way")
            return
        cancel_after_s = self._random.uniform(0, CANCEL_WITHIN_S)
        task = asyncio.ensure_future(self._request(self._source.draw(), due, cancel_after_s))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _request(self, request: Request, due: float, cancel_after_s: float) -> None:
        self._tally.lag_ms.append(1e3 * (self._clock() - due))
        outcome, reason = await self._send(request, cancel_after_s)
        now = self._clock()
        if outcome is Outcome.ANSWERED:
            self._tally.answered(request.label, 1e3 * (now - due), now)
            return
        if outcome is Outcome.OVERLOADED:
            self._tally.refused_ms.append(1e3 * (now - due))
        self._tally.ended(outcome, now, f"{request.label}: {reason}")


async def recovery_time(send: Send, source: RequestSource, within_ms: float) -> float | None:
    """Send one request after the other until one is answered in time, and return the seconds until then.

    Args:
        send: sends a request.
        source: of the requests.
        within_ms: longest time that counts as recovered.

    Returns:
        None if no request was within `RECOVERY_S`.
    """
    began = time.perf_counter()
    stream = source.stream(0, 1)
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
