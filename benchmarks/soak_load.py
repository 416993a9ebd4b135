"""The load of a soak: callers of one event loop, closed to measure a rate, then open at random moments."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from benchmarks.soak_requests import Expected, Mix, Request, Wish
from benchmarks.soak_tally import Outcome, Tally
from mirror_runtime.client.async_client import AsyncClient
from mirror_runtime.client.async_transports import AsyncGrpcTransport, AsyncHttpTransport
from mirror_runtime.client.protocol import MODEL_NAME, AsyncTransport, Parameters, Rejected
from mirror_runtime.errors import (
    DeadlineExceededError,
    InputError,
    MirrorError,
    OverloadedError,
    ServerError,
    UnavailableError,
)

TIMEOUT_S = 10.0
"""Of a request. At a share of what the server can do nothing takes nearly as long."""

CLOSED_CALLERS = 16
"""Enough to keep the server busy while the generator checks an answer."""

WARM_UP_REQUESTS = 20

MOST_UNDER_WAY = 1000
"""Requests; a server that has stopped answering must not fill the generator's memory."""

CANCEL_WITHIN_S = 0.02
"""A request of 32 texts mostly takes longer: it is cancelled while it waits, or while it is computed."""

_KINDS: tuple[tuple[type[MirrorError], Outcome], ...] = (
    (OverloadedError, Outcome.OVERLOADED),
    (UnavailableError, Outcome.UNAVAILABLE),
    (DeadlineExceededError, Outcome.LATE),
    (Rejected, Outcome.GOOD_REFUSED),
    (InputError, Outcome.GOOD_REFUSED),
    (ServerError, Outcome.FAILED),
)
"""Subclasses before their bases."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a request ended, and what was said of it."""

    outcome: Outcome
    reason: str = ""


class Callers:
    """Send requests over gRPC and HTTP and judge the answers. An async context manager, for one event loop.

    Good requests go through `AsyncClient`, which does not ask again where the server has too much to do: that would
    hide it. What `AsyncClient` does not let through goes to its transports, which are tritonclient's.

    Args:
        addresses: host and port by protocol.
        expected: texts and their right vectors.
        fingerprint: of the vector space that answers must name.
    """

    def __init__(self, addresses: Mapping[str, str], expected: Expected, fingerprint: str) -> None:
        self._addresses, self._expected, self._fingerprint = addresses, expected, fingerprint
        self._clients: dict[str, AsyncClient] = {}
        self._wires: dict[str, AsyncTransport] = {}

    async def __aenter__(self) -> Callers:
        for protocol, address in self._addresses.items():
            self._clients[protocol] = AsyncClient(
                address, protocol=protocol, timeout_s=TIMEOUT_S, fingerprint=self._fingerprint, patient=False
            )
        self._wires = {
            "grpc": AsyncGrpcTransport(self._addresses["grpc"], MODEL_NAME),
            "http": AsyncHttpTransport(self._addresses["http"], MODEL_NAME),
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients.values():
            await client.close()
        for wire in self._wires.values():
            await wire.close()

    async def send(self, request: Request, cancel_after_s: float) -> End:
        """Send a request, or cancel it that many seconds later where it is one to be cancelled."""
        try:
            if request.wish is Wish.GOOD:
                return await self._good(request)
            if request.wish is Wish.CANCELLED:
                return await self._cancelled(request, cancel_after_s)
            return await self._bad(request)
        except MirrorError as error:
            kinds = (outcome for kind, outcome in _KINDS if isinstance(error, kind))
            return End(outcome=next(kinds, Outcome.CRASHED), reason=_said(error))
        except Exception as error:
            # The edge of a caller: whatever the server has a library raise is a finding, and the load goes on.
            return End(outcome=Outcome.CRASHED, reason=_said(error))

    async def _good(self, request: Request) -> End:
        texts = [self._expected.texts[at] for at in request.chosen]
        vectors = await self._clients[request.protocol].encode(texts, len(texts))
        problem = self._expected.problem(request.chosen, vectors)
        return End(outcome=Outcome.WRONG_VECTOR if problem else Outcome.ANSWERED, reason=problem)

    async def _cancelled(self, request: Request, after_s: float) -> End:
        try:
            return await asyncio.wait_for(self._good(request), after_s)
        except asyncio.TimeoutError:
            return End(outcome=Outcome.CANCELLED)

    async def _bad(self, request: Request) -> End:
        texts = [self._expected.texts[at].encode() for at in request.chosen]
        parameters: Parameters = {}
        if request.wish is Wish.BAD_UTF8:
            texts[-1] += b" \xff"
        if request.wish is Wish.UNKNOWN_PARAMETER:
            parameters = {"normalise": True}
        tensor = np.array(texts, np.object_).reshape(-1, 1)
        try:
            await self._wires[request.protocol].submit(tensor, parameters, TIMEOUT_S)
        except Rejected as error:
            told = request.refusal in error.reason
            return End(outcome=Outcome.REFUSED if told else Outcome.OTHER_REFUSAL, reason=_said(error))
        return End(outcome=Outcome.NOT_REFUSED, reason=request.wish.value)


async def measure_rate(callers: Callers, mix: Mix, seconds: float, tally: Tally) -> float:
    """Give the good requests a second that a closed loop was answered; other ends go to the tally, as before the load.

    Returns:
        0 where none was answered.
    """
    answered = 0

    async def call(until: float) -> None:
        nonlocal answered
        while time.monotonic() < until:
            end = await callers.send(mix.good(), 0.0)
            if end.outcome is Outcome.ANSWERED:
                answered += 1
            else:
                tally.ended(end.outcome, 0.0, f"before the load: {end.reason}")

    for _ in range(WARM_UP_REQUESTS):
        await callers.send(mix.good(), 0.0)
    began = time.monotonic()
    await asyncio.gather(*(call(began + seconds) for _ in range(CLOSED_CALLERS)))
    return answered / (time.monotonic() - began)


class Arrivals:
    """Requests at random moments (Poisson), whether or not earlier ones are answered.

    Times count from the moment a request was due, so that neither a server nor a generator that stalls can hide it.

    Args:
        callers: that send them.
        mix: that draws them.
        rate: of them, a second.
        tally: that counts how they end.
        seed: of the moments.
        clock: seconds, monotonic, from the begin of the load.
    """

    def __init__(
        self, callers: Callers, mix: Mix, rate: float, tally: Tally, seed: int, clock: Callable[[], float]
    ) -> None:
        self._callers, self._mix, self._rate, self._tally, self._clock = callers, mix, rate, tally, clock
        self._random = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        """Send for some seconds, then wait for what is under way; cancelled, cancel that, too."""
        due = self._random.expovariate(self._rate)
        try:
            while due < seconds:
                # Also when it is late: the event loop must come to read answers.
                await asyncio.sleep(max(0.0, due - self._clock()))
                if len(self._under_way) >= MOST_UNDER_WAY:
                    self._tally.ended(Outcome.UNSENT, self._clock(), f"{MOST_UNDER_WAY} requests were under way")
                else:
                    patience_s = self._random.uniform(0, CANCEL_WITHIN_S)
                    task = asyncio.ensure_future(self._request(self._mix.draw(), due, patience_s))
                    self._under_way.add(task)
                    task.add_done_callback(self._under_way.discard)
                due += self._random.expovariate(self._rate)
            await asyncio.gather(*self._under_way)
        finally:
            left = list(self._under_way)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _request(self, request: Request, due: float, cancel_after_s: float) -> None:
        self._tally.sent(1e3 * (self._clock() - due))
        end = await self._callers.send(request, cancel_after_s)
        now = self._clock()
        if end.outcome is Outcome.ANSWERED:
            self._tally.answered(request.kind, 1e3 * (now - due))
        else:
            self._tally.ended(end.outcome, now, f"{request.kind}: {end.reason}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
