"""Where the load generator sends requests, Triton over gRPC or HTTP and `mirror gateway`, and how requests end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from enum import Enum

import aiohttp
import numpy as np

from benchmarks.load.requests import GRPC, ExpectedVectors, Kind, Request
from mirror_runtime.client.async_client import AsyncClient
from mirror_runtime.client.grpc_transport import AsyncGrpcTransport
from mirror_runtime.client.http_transport import AsyncHttpTransport
from mirror_runtime.client.protocol import MODEL_NAME, Rejected
from mirror_runtime.errors import DeadlineExceededError, InputError, OverloadedError, ServerError, UnavailableError
from mirror_runtime.vectors import Vectors


class Outcome(str, Enum):
    """How a request ended."""

    ANSWERED = "answered"
    """With the expected vectors, where they are known."""
    REFUSED = "bad request refused"
    """For the right reason."""
    CANCELLED = "cancelled"
    """By its caller, before an answer came."""
    WRONG_VECTOR = "wrong vector"
    NOT_REFUSED = "bad request answered"
    OTHER_REFUSAL = "bad request refused for another reason"
    GOOD_REFUSED = "good request refused"
    OVERLOADED = "overloaded"
    """Refused because the server had too much to do."""
    UNAVAILABLE = "unavailable"
    LATE = "no answer in time"
    FAILED = "server error"
    UNSENT = "not sent"
    """Too many requests were under way."""
    CRASHED = "caller failed"
    """With an exception that no caller of ours should see."""


EXPECTED = frozenset({Outcome.ANSWERED, Outcome.REFUSED, Outcome.CANCELLED})
"""How requests may end on a server that is not overloaded."""

REFUSAL = "not valid UTF-8"
"""Words that the refusal of a bad request must contain."""

_FAILURES = (
    (OverloadedError, Outcome.OVERLOADED),
    (UnavailableError, Outcome.UNAVAILABLE),
    (DeadlineExceededError, Outcome.LATE),
    ((Rejected, InputError), Outcome.GOOD_REFUSED),
    (ServerError, Outcome.FAILED),
    (Exception, Outcome.CRASHED),
)
"""Subclasses before their bases."""


class TritonTarget:
    """Triton over one protocol. Ordinary requests go through `AsyncClient`, bad ones straight to its transport."""

    def __init__(self, protocol: str, address: str, timeout_s: float, fingerprint: str | None) -> None:
        self._timeout_s = timeout_s
        self._client = AsyncClient(
            address, protocol=protocol, timeout_s=timeout_s, fingerprint=fingerprint, patient=False
        )
        transport = AsyncGrpcTransport if protocol == GRPC else AsyncHttpTransport
        self._transport = transport(address, MODEL_NAME)

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Send texts in one request and return their vectors."""
        return await self._client.encode(texts, len(texts))

    async def submit(self, texts: Sequence[bytes]) -> None:
        """Send bytes as they are."""
        await self._transport.submit(np.array(texts, np.object_).reshape(-1, 1), {}, self._timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await self._transport.close()


class GatewayTarget:
    """The gateway's /embed over HTTP connections that stay open: as many as there are requests under way."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._url = f"http://{address}/embed"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=timeout_s)
        )

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Send texts in one request and return their vectors, float32 [texts, dim]."""
        try:
            async with self._session.post(self._url, json={"inputs": list(texts)}) as response:
                content = await response.read()
        except asyncio.TimeoutError as error:
            raise DeadlineExceededError("the gateway did not answer in time") from error
        except aiohttp.ClientError as error:
            raise UnavailableError(f"the gateway did not answer: {error or type(error).__name__}") from error
        shown = content[:200].decode("utf-8", "replace")
        if response.status != 200:
            kind = OverloadedError if response.status in (429, 503) else ServerError
            raise kind(f"the gateway answered HTTP {response.status}: {shown}")
        try:
            return np.asarray(json.loads(content), np.float32)
        except ValueError as error:
            raise ServerError(f"the gateway's answer is not vectors: {shown}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


Target = TritonTarget | GatewayTarget
"""A server as one event loop reaches it. Every failure is a `MirrorError`; an overloaded server is not retried."""


class Sender:
    """Sends requests to their targets, and compares the answers unless `expected` is None."""

    def __init__(self, targets: Mapping[str, Target], texts: Sequence[str], expected: ExpectedVectors | None) -> None:
        self._targets, self._texts, self._expected = targets, texts, expected

    async def send(self, request: Request, cancel_after_s: float = 0.0) -> tuple[Outcome, str]:
        """Send a request, one of kind `CANCELLED` for so long, and return how it ended and why. Never raises."""
        kind, target = request.kind, self._targets[request.target]
        texts = [self._texts[at] for at in request.chosen]
        try:
            if kind is Kind.BAD:
                assert isinstance(target, TritonTarget)  # the gateway gets good requests alone
                *good, last = (text.encode() for text in texts)
                await target.submit([*good, last + b" \xff"])
                return Outcome.NOT_REFUSED, kind.value
            vectors = await asyncio.wait_for(target.encode(texts), cancel_after_s if kind is Kind.CANCELLED else None)
            problem = "" if self._expected is None else self._expected.problem(request.chosen, vectors)
            return (Outcome.WRONG_VECTOR if problem else Outcome.ANSWERED), problem
        except Exception as error:
            # The edge of a caller: whatever a library raises is a finding, and the load goes on.
            return _outcome(kind, error), f"{type(error).__name__}: {error}"


def _outcome(kind: Kind, error: Exception) -> Outcome:
    if kind is Kind.CANCELLED and isinstance(error, asyncio.TimeoutError):
        return Outcome.CANCELLED
    if kind is Kind.BAD and isinstance(error, Rejected):
        return Outcome.REFUSED if REFUSAL in error.reason else Outcome.OTHER_REFUSAL
    return next(outcome for kinds, outcome in _FAILURES if isinstance(error, kinds))
