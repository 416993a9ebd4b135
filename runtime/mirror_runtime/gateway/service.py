"""What is admitted, how long it may take, and whether the gateway is healthy. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.client.chunks import Served
from mirror_runtime.errors import EngineError
from mirror_runtime.gateway.backends import PROBE, Backend
from mirror_runtime.gateway.errors import Refusal, overloaded, refusal_of, unavailable
from mirror_runtime.gateway.metrics import Metrics
from mirror_runtime.gateway.settings import Settings

FRESH_S = 1.0
"""How long a success or failure is believed: a probe a second costs nothing, however many ask."""

PROBE_S = 10.0
"""A probe waits its turn behind accepted texts. Beyond this they do not get theirs in time either."""

REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="-")
"""Of the request under way: what its lines in the log begin with."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Vectors of a request.

    Attributes:
        vectors: float32 [n, dimensions], contiguous, little-endian.
        tokens: of all texts together, before anything was cut.
        truncated: positions of the texts that were cut.
        fingerprint: of the vector space.
    """

    vectors: NDArray[np.float32]
    tokens: int
    truncated: list[int]
    fingerprint: str


class Service:
    """The gateway behind its routes.

    Args:
        backend: who computes.
        settings: the operator's.
        metrics: where things are counted.

    Attributes:
        draining: whether the gateway is about to stop.

    Raises:
        InputError: the settings do not fit the encoder.
    """

    def __init__(self, backend: Backend, settings: Settings, metrics: Metrics) -> None:
        settings.check_dimensions(backend.card.dim)
        self.backend = backend
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self._in_flight = 0
        self._seen_at = -FRESH_S
        self._problem: Exception | None = None
        self._probing = asyncio.Lock()

    async def encode(
        self,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool | None = None,
    ) -> Answer:
        """Encode a request's texts.

        Args:
            texts: at least one.
            dimensions: keep the first so many components; None for all.
            normalize: None for what the encoder does.
            truncate: False refuses texts over the encoder's limit that would be cut.

        Raises:
            Refusal: the request cannot be answered. Whatever it is, it is counted and, where nobody but the operator
                can mend it, logged.
        """
        if dimensions == self.backend.card.dim:
            dimensions = None
        try:
            self._check(len(texts), dimensions, normalize)
            with self._admitted(len(texts)):
                served = await self.backend.encode(texts)
                _check_finite(served)
                self._note(None)
            return self._finish(served, dimensions, normalize, truncate)
        except Exception as error:  # the edge of the service: whatever happened, the client gets an answer
            refusal = refusal_of(error)
            self.metrics.refused.labels(refusal.code).inc()
            if refusal.status >= 500:
                _log.error("request %s: %s: %s", REQUEST_ID.get(), type(error).__name__, error)
            raise refusal from error

    async def check_health(self) -> None:
        """Make sure that inferences succeed: one that succeeded less than a second ago will do.

        Raises:
            Refusal: they do not, or the gateway is about to stop.
        """
        if self.draining:
            raise unavailable("draining", "this gateway is about to stop")
        async with self._probing:
            if time.monotonic() - self._seen_at >= FRESH_S:
                try:
                    # Past the bound on accepted texts: being busy is not being ill.
                    _check_finite(await asyncio.wait_for(self.backend.encode([PROBE]), PROBE_S))
                    self._note(None)
                except Exception as error:  # the same edge
                    self._note(error)
                    _log.warning("not healthy: %s: %s", type(error).__name__, error)
        if self._problem is not None:
            raise unavailable("unhealthy", "an inference has just failed; the gateway's log says why")

    def _note(self, problem: Exception | None) -> None:
        self._problem = problem
        self._seen_at = time.monotonic()

    def _check(self, count: int, dimensions: int | None, normalize: bool | None) -> None:
        card, settings = self.backend.card, self.settings
        if count > settings.max_batch:
            raise Refusal(
                413, "batch_too_large", f"{count} texts in one request: at most {settings.max_batch}", param="input"
            )
        if dimensions not in (None, *settings.dimensions):
            allowed = ", ".join(map(str, (*settings.dimensions, card.dim)))
            raise Refusal(
                400,
                "dimensions_not_allowed",
                f"dimensions is {dimensions}: this encoder's vectors may have {allowed}",
                param="dimensions",
            )
        if normalize is False and card.normalized:
            raise Refusal(
                400,
                "normalize_not_possible",
                "normalize is false, and this encoder's vectors have length 1 from the start: leave it out",
                param="normalize",
            )

    @contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        """Hold a place for texts, or refuse them at once."""
        limit = self.settings.max_in_flight
        if self._in_flight + count > limit:
            raise overloaded(
                f"{self._in_flight} texts are being encoded and {count} more would exceed {limit}: try again later"
            )
        self._in_flight += count
        self.metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= count
            self.metrics.in_flight.set(self._in_flight)

    def _finish(self, served: Served, dimensions: int | None, normalize: bool | None, truncate: bool | None) -> Answer:
        if served.errors:
            raise served.errors[min(served.errors)]
        truncated: list[int] = np.flatnonzero(served.truncated).tolist()
        if truncated and truncate is False:
            at = truncated[0]
            raise Refusal(
                413,
                "text_too_long",
                f"text {at} has {served.tokens[at]} tokens and the encoder takes {self.backend.card.max_tokens}: "
                "shorten it, or leave out truncate=false",
                param="inputs",
            )
        vectors = served.vectors[:, :dimensions]
        scaled = normalize if normalize is not None else self.backend.card.normalized
        if scaled and (dimensions is not None or not self.backend.card.normalized):
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        tokens = int(served.tokens.sum())
        self.metrics.batch.observe(len(vectors))
        self.metrics.tokens.inc(tokens)
        self.metrics.truncated.inc(len(truncated))
        return Answer(
            vectors=np.ascontiguousarray(vectors, dtype="<f4"),
            tokens=tokens,
            truncated=truncated,
            fingerprint=served.fingerprint or self.backend.card.fingerprint,
        )


def _check_finite(served: Served) -> None:
    """See that vectors are numbers: a NaN would leave as null.

    Raises:
        EngineError: they are not.
    """
    if not np.isfinite(served.vectors).all():
        raise EngineError("the engine gave vectors that are not finite")
