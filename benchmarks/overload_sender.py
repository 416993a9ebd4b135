"""The sender of the overload, in a process of its own: callers that share a Python with anything else come too late.

    python -m benchmarks.overload_sender < order.json

Standard output is one JSON object, `Sent`. Times count from the moment a request was due, not from when it was sent.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.load import arrivals
from benchmarks.summary import percentile
from mirror_runtime.bundle import from_json, to_json
from mirror_runtime.client.async_client import AsyncClient
from mirror_runtime.errors import MirrorError, OverloadedError, ServerError

FACTOR = 2.0
"""What is offered, over what the server can do."""

TIMEOUT_S = 30.0
"""Of one request: who is taken waits for at most so long."""

RECOVERY_S = 30.0
"""After this a server that is still slow counts as not recovered."""

PAUSE_S = 0.01
"""Before a caller that was refused asks again."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be sent.

    Attributes:
        url: host and port of Triton's gRPC.
        requests: texts of each, equally many; they are sent in turn.
        callers: of the closed loop that finds the maximum.
        calm_s: how long that loop and the calm before it take, each.
        seconds: for how long too much is sent.
        seed: of the arrivals.
    """

    url: str
    requests: tuple[tuple[str, ...], ...]
    callers: int
    calm_s: float
    seconds: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What the sender saw.

    Attributes:
        calm_ms: times of requests sent one after another to a server with nothing else to do.
        maximum_texts_per_s: of a closed loop of the same requests.
        offered: requests that were due.
        accepted_ms: times of those that were answered.
        refused_ms: times of those that were refused.
        lag_ms: how long after it was due each was sent: large where the sender, not the server, was too slow.
        errors: requests with neither an answer nor a refusal.
        reason: of the first of these.
        wall_s: from the first moment to the last one due, or the last answer.
        recovery_s: from the last request sent until a fresh request was answered within the calm's p99; None where
            none was.
    """

    calm_ms: tuple[float, ...]
    maximum_texts_per_s: float
    offered: int
    accepted_ms: tuple[float, ...]
    refused_ms: tuple[float, ...]
    lag_ms: tuple[float, ...]
    errors: int
    reason: str
    wall_s: float
    recovery_s: float | None


class AsyncCaller(Protocol):
    """What sends a request and passes a refusal on at once; an impatient `AsyncClient` is one."""

    async def encode(self, texts: Sequence[str], batch_size: int) -> object:
        """Send texts in one request and wait for their vectors.

        Raises:
            OverloadedError: the server refused.
            MirrorError: it failed.
        """


async def send(order: Order, caller: AsyncCaller) -> Sent:
    """Find out what the server does in calm and at most, send it too much, and wait until it is as it was.

    Raises:
        MirrorError: the server failed before there was too much to do.
    """
    await _ask(order, caller, 0)  # connects
    calm_ms = await _calm(order, caller)
    maximum = await _maximum(order, caller)
    size = len(order.requests[0])
    due = arrivals(FACTOR * maximum / size, order.seconds, order.seed)
    flood = _Flood(order, caller)
    requests = await flood.start(due)
    recovery_s = await _recovery(order, caller, percentile(calm_ms, 99))
    await asyncio.gather(*requests)
    return Sent(
        calm_ms=tuple(calm_ms),
        maximum_texts_per_s=maximum,
        offered=len(due),
        accepted_ms=tuple(flood.accepted_ms),
        refused_ms=tuple(flood.refused_ms),
        lag_ms=tuple(flood.lag_ms),
        errors=flood.errors,
        reason=flood.reason,
        wall_s=max(order.seconds, flood.last_answer - flood.began),
        recovery_s=recovery_s,
    )


async def _ask(order: Order, caller: AsyncCaller, at: int) -> None:
    texts = order.requests[at % len(order.requests)]
    await caller.encode(texts, batch_size=len(texts))


async def _calm(order: Order, caller: AsyncCaller) -> list[float]:
    """Give the times, in milliseconds, of requests sent one after another."""
    samples: list[float] = []
    ends = time.perf_counter() + order.calm_s
    while not samples or time.perf_counter() < ends:
        asked = time.perf_counter()
        await _ask(order, caller, len(samples))
        samples.append(1e3 * (time.perf_counter() - asked))
    return samples


async def _maximum(order: Order, caller: AsyncCaller) -> float:
    """Give the texts a second of a closed loop."""
    began = time.perf_counter()
    answered = 0

    async def call(number: int) -> None:
        nonlocal answered
        at = number * len(order.requests) // order.callers
        while time.perf_counter() < began + order.calm_s:
            try:
                await _ask(order, caller, at)
            except OverloadedError:  # long texts: the callers alone are more than the server takes at once
                await asyncio.sleep(PAUSE_S)
                continue
            answered += 1
            at += 1

    await asyncio.gather(*(call(number) for number in range(order.callers)))
    if not answered:
        raise ServerError("no request was answered before there was too much to do")
    return answered * len(order.requests[0]) / (time.perf_counter() - began)


@dataclass
class _Flood:
    """Sends requests when they are due, whether or not earlier ones are answered, and collects what becomes of them."""

    order: Order
    caller: AsyncCaller
    began: float = 0.0
    last_answer: float = 0.0
    accepted_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    errors: int = 0
    reason: str = ""

    async def start(self, due: Sequence[float]) -> list[asyncio.Task[None]]:
        """Send everything, and give the requests, of which some are still under way."""
        requests = []
        self.began = time.perf_counter()
        for at, moment in enumerate(due):
            # Also where it is late already: answers must be taken meanwhile.
            await asyncio.sleep(max(0.0, self.began + moment - time.perf_counter()))
            requests.append(asyncio.create_task(self._request(at, self.began + moment)))
        await asyncio.sleep(0)  # the last one, too, is sent when this returns
        return requests

    async def _request(self, at: int, due: float) -> None:
        self.lag_ms.append(1e3 * (time.perf_counter() - due))
        try:
            await _ask(self.order, self.caller, at)
        except OverloadedError:
            self.refused_ms.append(1e3 * (time.perf_counter() - due))
        except MirrorError as error:
            self.errors += 1
            self.reason = self.reason or str(error)
        else:
            self.last_answer = time.perf_counter()
            self.accepted_ms.append(1e3 * (self.last_answer - due))


async def _recovery(order: Order, caller: AsyncCaller, within_ms: float) -> float | None:
    """Send one request after another until one is answered in time, and give the seconds until then.

    Args:
        order: what is sent.
        caller: sends it.
        within_ms: what counts as in time.

    Returns:
        None where there was none within `RECOVERY_S`.
    """
    began = asked = time.perf_counter()
    at = 0
    while asked < began + RECOVERY_S:
        try:
            await _ask(order, caller, at)
        except MirrorError:
            await asyncio.sleep(PAUSE_S)
        else:
            now = time.perf_counter()
            if 1e3 * (now - asked) <= within_ms:
                return now - began
        at += 1
        asked = time.perf_counter()
    return None


async def _sent(order: Order) -> Sent:
    async with AsyncClient(order.url, timeout_s=TIMEOUT_S, patient=False) as client:
        return await send(order, client)


def main() -> int:
    """Read an order, carry it out, and write what was seen.

    Returns:
        0, or 1 where the server failed; standard error says how.
    """
    order = from_json(Order, json.load(sys.stdin), "the order")
    try:
        sent = asyncio.run(_sent(order))
    except MirrorError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    json.dump(to_json(sent), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
