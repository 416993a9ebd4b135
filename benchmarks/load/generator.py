"""Closed and open loops of one event loop, and what they count."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.requests import Request
from benchmarks.load.targets import EXPECTED, Outcome
from benchmarks.report.statistics import percentile

RECOVERY_S = 30.0
"""A server that is still slow after this has not recovered."""

REFUSED_PAUSE_S = 0.01
"""Pause of a closed loop's caller after an overloaded server refused its request."""

MOST_UNDER_WAY = 1000
"""Requests of an open loop. A server that has stopped answering must not fill the generator's memory."""

CANCEL_WITHIN_S = 0.02
"""A request of 32 texts mostly takes longer, so it is cancelled while it waits or while it is computed."""

Send = Callable[[Request, float], Awaitable[tuple[Outcome, str]]]
"""`Sender.send`."""


@dataclass(kw_only=True)
class Window:
    """What ended within some time of a loop.

    Attributes:
        at_s: its end, in seconds since the loop began.
        seconds: its length.
        answered_ms: times of right answers by target and texts, such as "grpc 8".
        refused_ms: times until an overloaded server refused.
        lag_ms: how long after it was due each request was sent: the generator's own share of the times.
        outcomes: requests by `Outcome`.
        first: when the first request of each unexpected outcome ended, and its error.
        cpu_s: processor time of the generator.
        last_answer_s: when the last right answer came, in seconds since the loop began.
        recovery_s: how long after an open loop's last request the server was fast again; None if it was not, or if
            that was not measured.
    """

    at_s: float = 0.0
    seconds: float = 0.0
    answered_ms: dict[str, list[float]] = field(default_factory=dict)
    refused_ms: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[float, str]] = field(default_factory=dict)
    cpu_s: float = 0.0
    last_answer_s: float = 0.0
    recovery_s: float | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Window:
        """Read what `vars` and JSON made of a window."""
        first = {outcome: (at_s, reason) for outcome, (at_s, reason) in data["first"].items()}
        return cls(**{**data, "outcomes": Counter(data["outcomes"]), "first": first})

    def end(self, outcome: Outcome, at_s: float, reason: str) -> None:
        """Count an end, and keep the first reason of an unexpected one."""
        self.outcomes[outcome.value] += 1
        if outcome not in EXPECTED:
            self.first.setdefault(outcome.value, (at_s, reason))

    @property
    def times_ms(self) -> tuple[float, ...]:
        """Times of all right answers."""
        return tuple(time for times in self.answered_ms.values() for time in times)

    @property
    def rate(self) -> float:
        """Right answers per second."""
        return len(self.times_ms) / self.seconds if self.seconds else 0.0

    @property
    def requests(self) -> int:
        """Requests that ended."""
        return sum(self.outcomes.values())

    def count(self, *outcomes: Outcome) -> int:
        """Return how many requests ended in one of these ways."""
        return sum(self.outcomes.get(outcome.value, 0) for outcome in outcomes)

    @property
    def unexpected(self) -> int:
        """Requests that ended as none may on a server that is not overloaded."""
        return self.requests - self.count(*EXPECTED)

    @property
    def lag_p99_ms(self) -> float:
        """How late requests were sent at p99; 0 where none was."""
        return percentile(self.lag_ms or [0.0], 99)

    @property
    def reason(self) -> str:
        """The error of the earliest unexpected end; "" if there is none."""
        return min(self.first.values(), default=(0.0, ""))[1]


def arrivals(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Draw `rate * seconds` moments, at least one, of a Poisson process: in seconds, in order."""
    return np.sort(np.random.default_rng(seed).uniform(0, seconds, size=max(1, round(rate * seconds))))


class Loop:
    """One closed or open loop. The time of a request counts from the moment it was due."""

    def __init__(self, send: Send) -> None:
        self._send, self._window = send, Window()
        self._least_s: float | None = None  # length, once all requests have ended
        self._start()

    async def closed(self, streams: Sequence[Iterator[Request]], seconds: float) -> Window:
        """Run a caller for each stream, which sends its next request when the last one is answered, for some seconds.

        Each first sends one that is not counted. A request under way at the end is waited for and counted, and so is
        its time. A caller whose request fails before any was answered stops, as then probably nothing works.
        """
        await asyncio.gather(*(self._send(next(stream), 0.0) for stream in streams))
        self._start()

        async def call(stream: Iterator[Request]) -> None:
            while (due := self._clock()) < seconds:
                outcome = await self._request(next(stream), due, 0.0)
                if outcome is Outcome.OVERLOADED:  # long texts: the callers alone have more than the server accepts
                    await asyncio.sleep(REFUSED_PAUSE_S)
                elif not self._window.answered_ms:
                    return

        await asyncio.gather(*map(call, streams))
        self._least_s = 0.0
        return self.take()

    async def open(
        self, requests: Iterator[Request], *, rate: float, seconds: float, seed: int, calm_ms: float | None = None
    ) -> None:
        """Send requests at random moments (Poisson), whether or not earlier ones are answered, and await all.

        If cancelled, it cancels those under way. `recovery_time` is measured after the last request is sent.
        """
        draw = random.Random(seed)
        under_way: set[asyncio.Task[Outcome]] = set()
        self._start()
        try:
            for due in arrivals(rate, seconds, seed).tolist():
                # Also when it is late: the event loop must get to read answers.
                await asyncio.sleep(max(0.0, due - self._clock()))
                if len(under_way) >= MOST_UNDER_WAY:
                    self._window.end(Outcome.UNSENT, self._clock(), f"{MOST_UNDER_WAY} requests were under way")
                    continue
                task = asyncio.ensure_future(self._request(next(requests), due, draw.uniform(0, CANCEL_WITHIN_S)))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.sleep(0)  # lets the last one be sent
            if calm_ms is not None:
                self._window.recovery_s = await recovery_time(self._send, requests, calm_ms)
            await asyncio.gather(*under_way)
            self._least_s = seconds
        finally:
            left = list(under_way)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def take(self) -> Window:
        """Return what ended since the last call; once all have ended, up to the last request due or the last answer."""
        window, cpu_s = self._window, time.process_time()
        window.at_s = self._clock() if self._least_s is None else max(self._least_s, window.last_answer_s)
        window.seconds, window.cpu_s = window.at_s - self._taken_s, cpu_s - self._cpu_s
        self._window, self._taken_s, self._cpu_s = Window(), window.at_s, cpu_s
        return window

    def _start(self) -> None:
        self._began, self._taken_s, self._cpu_s = time.perf_counter(), 0.0, time.process_time()

    def _clock(self) -> float:
        return time.perf_counter() - self._began

    async def _request(self, request: Request, due: float, cancel_after_s: float) -> Outcome:
        self._window.lag_ms.append(1e3 * (self._clock() - due))
        outcome, reason = await self._send(request, cancel_after_s)
        now, label, window = self._clock(), f"{request.target} {len(request.chosen)}", self._window
        window.end(outcome, now, f"{label}: {reason}")
        if outcome is Outcome.ANSWERED:
            window.answered_ms.setdefault(label, []).append(1e3 * (now - due))
            window.last_answer_s = now
        elif outcome is Outcome.OVERLOADED:
            window.refused_ms.append(1e3 * (now - due))
        return outcome


async def recovery_time(send: Send, requests: Iterator[Request], within_ms: float) -> float | None:
    """Send one request after the other until one is answered within `within_ms`, and return the seconds until then.

    None if no request was within `RECOVERY_S`.
    """
    began = time.perf_counter()
    while (sent := time.perf_counter()) < began + RECOVERY_S:
        outcome, _ = await send(next(requests), 0.0)
        now = time.perf_counter()
        if outcome is not Outcome.ANSWERED:
            await asyncio.sleep(REFUSED_PAUSE_S)
        elif 1e3 * (now - sent) <= within_ms:
            return now - began
    return None
