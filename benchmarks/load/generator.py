"""The load generator, a process of its own: callers that share a Python process with anything else send too late.

    python -m benchmarks.load.generator FILE

reads what it sends where, as `load_process` pickled it, and then speaks line JSON with its parent (see
`benchmarks.workers`). `Load` is the parent's end, `Generator` the child's; `Loop` is what the child runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.requests import GATEWAY, KINDS, ExpectedVectors, Kind, Request, in_turn, mix
from benchmarks.load.targets import EXPECTED, GatewayTarget, Outcome, Sender, TritonTarget
from benchmarks.report.statistics import percentile
from benchmarks.workers import WorkerProcess
from mirror_runtime.triton.server.server import launcher

ROOT = Path(__file__).resolve().parents[2]

RECOVERY_S = 30.0
"""A server that is still slow after this has not recovered."""

REFUSED_PAUSE_S = 0.01
"""Pause of a closed loop's caller after an overloaded server refused its request."""

MOST_UNDER_WAY = 1000
"""Requests of an open loop. A server that has stopped answering must not fill the generator's memory."""

CANCEL_WITHIN_S = 0.02
"""A request of 32 texts mostly takes longer, so it is cancelled while it waits or while it is computed."""

Turn = tuple[str, int]
"""A target and the texts per request: one size in turn instead of a mix."""

End = Literal["", "wait", "stop"]

Send = Callable[[Request, float], Awaitable[tuple[Outcome, str]]]
"""`Sender.send`."""


@dataclass(kw_only=True)
class Window:
    """What ended within some time of a loop.

    Attributes:
        at_s: its end, in seconds since the loop began.
        seconds: its length.
        times_ms: of right answers.
        refused_ms: times until an overloaded server refused.
        lag_ms: how long after it was due each request was sent: the generator's own share of the times.
        outcomes: requests by `Outcome`.
        first: when the first request of each unexpected outcome ended, and its error.
        recovery_s: how long after an open loop's last request the server was fast again; None if it was not, or if
            that was not measured.
    """

    at_s: float = 0.0
    seconds: float = 0.0
    times_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[float, str]] = field(default_factory=dict)
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


class Load:
    """The parent's end of a running generator. Every method raises `PeerError` if the generator failed."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker

    def closed(self, *, callers: int, seconds: float, turn: Turn | None = None, seed: int = 0) -> Window:
        """Run a closed loop: see `Loop.closed`. Without `turn` it sends the mix's good requests."""
        return Window.from_json(self._worker.ask("closed", callers=callers, seconds=seconds, turn=turn, seed=seed))

    def begin(
        self, *, rate: float, seconds: float, seed: int, turn: Turn | None = None, calm_ms: float | None = None
    ) -> None:
        """Begin an open loop, of the mix without `turn`, and return while it runs: see `Loop.open`."""
        self._worker.ask("begin", rate=rate, seconds=seconds, seed=seed, turn=turn, calm_ms=calm_ms)

    def take(self, end: End = "") -> Window:
        """Return what ended since the last call; wait for the loop's end first ("wait"), or cancel it ("stop")."""
        return Window.from_json(self._worker.ask("take", end=end))


@contextmanager
def load_process(
    addresses: Mapping[str, str], texts: Sequence[str], *, timeout_s: float, expected: ExpectedVectors | None = None
) -> Iterator[Load]:
    """Start a generator, whose connections are closed and which has ended on exit.

    Args:
        addresses: host and port of each target by name.
        texts: that are sent.
        timeout_s: limit of one request, in seconds.
        expected: right vectors of the texts, which then are `expected.texts`; needed by a mix.
    """
    with TemporaryDirectory(prefix="mirror-load-") as folder:
        data, log = Path(folder) / "data", Path(folder) / "log"
        data.write_bytes(pickle.dumps((dict(addresses), tuple(texts), timeout_s, expected)))
        command = [*launcher(), sys.executable, "-m", "benchmarks.load.generator", str(data)]
        with WorkerProcess(command, log, folder=ROOT) as worker:
            yield Load(worker)


def arrivals(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Draw `rate * seconds` moments, at least one, of a Poisson process: in seconds, in order."""
    return np.sort(np.random.default_rng(seed).uniform(0, seconds, size=max(1, round(rate * seconds))))


class Loop:
    """One closed or open loop. The time of a request counts from the moment it was due."""

    def __init__(self, send: Send) -> None:
        self._send, self._window = send, Window()
        self._least_s: float | None = None  # length, once all requests have ended
        self._began, self._taken_s, self._last_answer_s = time.perf_counter(), 0.0, 0.0

    async def closed(self, streams: Sequence[Iterator[Request]], seconds: float) -> Window:
        """Run a caller for each stream, which sends its next request when the last one is answered, for some seconds.

        Each first sends one that is not counted. A request under way at the end is waited for and counted, and so is
        its time. A caller whose request fails before any was answered stops, as then probably nothing works.
        """
        await asyncio.gather(*(self._send(next(stream), 0.0) for stream in streams))
        self._began = time.perf_counter()

        async def call(stream: Iterator[Request]) -> None:
            while (due := self._clock()) < seconds:
                outcome = await self._request(next(stream), due, 0.0)
                if outcome is Outcome.OVERLOADED:  # long texts: the callers alone have more than the server accepts
                    await asyncio.sleep(REFUSED_PAUSE_S)
                elif not self._window.times_ms:
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
        self._began = time.perf_counter()
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
        window, self._window = self._window, Window()
        window.at_s = self._clock() if self._least_s is None else max(self._least_s, self._last_answer_s)
        window.seconds, self._taken_s = window.at_s - self._taken_s, window.at_s
        return window

    def _clock(self) -> float:
        return time.perf_counter() - self._began

    async def _request(self, request: Request, due: float, cancel_after_s: float) -> Outcome:
        self._window.lag_ms.append(1e3 * (self._clock() - due))
        outcome, reason = await self._send(request, cancel_after_s)
        now, label, window = self._clock(), f"{request.target} {len(request.chosen)}", self._window
        window.end(outcome, now, f"{label}: {reason}")
        if outcome is Outcome.ANSWERED:
            window.times_ms.append(1e3 * (now - due))
            self._last_answer_s = now
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


class Generator:
    """The generator's operations, named as in the protocol and in `Load`."""

    def __init__(self, send: Send, texts: Sequence[str], expected: ExpectedVectors | None) -> None:
        self._send, self._texts, self._expected = send, texts, expected

    async def closed(self, callers: int, seconds: float, turn: Turn | None, seed: int) -> dict[str, Any]:
        """Run a closed loop. Callers of the mix draw from one sequence; others start at places of their own."""
        mixed = self._requests(turn, seed, kinds={Kind.GOOD: 1.0})
        streams = [mixed if turn is None else self._requests(turn, seed, at / callers) for at in range(callers)]
        return vars(await Loop(self._send).closed(streams, seconds))

    async def begin(self, turn: Turn | None, seed: int, **options: Any) -> dict[str, Any]:
        """Begin an open loop."""
        self._loop = Loop(self._send)
        self._task = asyncio.ensure_future(self._loop.open(self._requests(turn, seed), seed=seed, **options))
        return {}

    async def take(self, end: End) -> dict[str, Any]:
        """Return the window since the last call, after the loop's end where `end` states it."""
        if end == "wait":
            await self._task
        elif end == "stop":
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        return vars(self._loop.take())

    def _requests(
        self, turn: Turn | None, seed: int, start: float = 0.0, kinds: Mapping[Kind, float] = KINDS
    ) -> Iterator[Request]:
        if turn is not None:
            return in_turn(*turn, len(self._texts), start)
        assert self._expected is not None
        return mix(self._expected, seed, kinds)


async def serve(data: Path) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to standard error
    addresses, texts, timeout_s, expected = pickle.loads(data.read_bytes())
    targets = {
        name: GatewayTarget(address, timeout_s)
        if name == GATEWAY
        else TritonTarget(name, address, timeout_s, expected and expected.fingerprint)
        for name, address in addresses.items()
    }
    generator = Generator(Sender(targets, texts, expected).send, texts, expected)
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        try:
            answer = await getattr(generator, request.pop("op"))(**request)
        except Exception as error:  # the process's edge: the parent decides what a failure means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for target in targets.values():
        await target.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
