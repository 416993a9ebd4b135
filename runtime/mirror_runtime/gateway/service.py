"""Admission, post-processing and health of a gateway, without HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.client.exchange import Served
from mirror_runtime.client.protocol import PROBE_TEXT
from mirror_runtime.errors import EngineError, NotFiniteError
from mirror_runtime.gateway.backends import EncodingBackend
from mirror_runtime.gateway.errors import Refusal, refusal_of, unavailable
from mirror_runtime.gateway.metrics import GatewayMetrics
from mirror_runtime.gateway.scheduler import Scheduler
from mirror_runtime.gateway.settings import GatewaySettings
from mirror_runtime.tokenizer import Item
from mirror_runtime.twins import Speed
from mirror_runtime.vectors import check_cuts, cut

FRESH_S = 1.0
"""How long a success or failure counts: one probe a second costs nothing, however many clients check."""

PROBE_S = 10.0
"""Timeout of a probe, and of the inferences under way: one of them ends in this time, or the gateway is not healthy."""

REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="-")
"""The id of the current request, for the log."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodingResult:
    """The vectors of a request."""

    vectors: NDArray[np.float32]  # [n, dimensions], contiguous, little-endian; for `tokens` of all tokens
    tokens: int  # of all texts together, before truncation
    truncated: list[int]  # positions of the truncated texts
    fingerprint: str
    counts: NDArray[np.int64] | None = None  # [n], vectors of each text; None where each has one


class GatewayService:
    """Encodes requests within the gateway's limits. `draining` is true when the gateway is about to stop.

    `twin` answers requests for the speed `fast`, within limits of its own.
    """

    def __init__(
        self,
        backend: EncodingBackend,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        twin: EncodingBackend | None = None,
    ) -> None:
        check_cuts(settings.dimensions, backend.card.dim, backend.card.dimensions)
        self.backend = backend
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.scheduler = Scheduler(backend, settings.max_in_flight)
        if backend.cached is not None:
            metrics.show_cache(backend.cached.cache)
        self.twin = twin
        self._twin_scheduler = None if twin is None else Scheduler(twin, settings.max_in_flight)
        self._outcome_at = -FRESH_S
        self._problem: Exception | None = None
        self._probing = asyncio.Lock()

    @property
    def dimensions(self) -> tuple[int, ...]:
        """What a request's `dimensions` may be; the last is the whole vector."""
        card = self.backend.card
        return (*(self.settings.dimensions or card.dimensions), card.dim)

    async def encode(
        self,
        texts: Sequence[Item],
        caller: str = "",
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool | None = None,
        prompt: str = "",
        speed: str | None = None,
    ) -> EncodingResult:
        """Encode a request's texts or pairs, at least one, with the request's own parameters, see `schema`.

        Requests of equal `caller` share one caller's part of the backend.

        Raises a `Refusal`, which is counted, and logged if only the operator can fix the cause.
        """
        if dimensions == self.backend.card.dim:
            dimensions = None
        try:
            self._check(len(texts), dimensions, normalize)
            with self._counted(len(texts)):
                items = [f"{prompt}{text}" for text in texts] if prompt else texts
                served = await self._encode(self.at(speed), items, caller)
            return self._finish(served, dimensions, normalize, truncate)
        except Exception as error:  # the edge of the service: every failure must become a response
            refusal = refusal_of(error)
            self.metrics.refused.labels(refusal.code).inc()
            if refusal.status >= 500:
                self._record_outcome(error)
                _log.error("request %s: %s: %s", REQUEST_ID.get(), type(error).__name__, error)
            raise refusal from error

    async def _encode(self, backend: EncodingBackend, texts: Sequence[Item], caller: str) -> Served:
        """Encode with a backend what its cache has not: only that waits for a turn."""
        looked_up = None if backend.cached is None else backend.cached.look_up(texts)
        if missing := texts if looked_up is None else looked_up.missing:
            scheduler = self.scheduler if backend is self.backend else self._twin_scheduler
            assert scheduler is not None
            served = await scheduler.encode(missing, caller)
            _check_finite(served)
            self._record_outcome(None)
        else:
            served = await backend.encode([])
        return served if looked_up is None else replace(served, **vars(looked_up.complete(served)))

    @property
    def speeds(self) -> dict[str, str]:
        """What a request's `speed` may be, each with the fingerprint of what answers."""
        found = {Speed.FULL.value: self.backend.card.fingerprint}
        return found if self.twin is None else found | {Speed.FAST.value: self.twin.card.fingerprint}

    def at(self, speed: str | None) -> EncodingBackend:
        """Return the backend of a speed.

        Raises:
            Refusal: it has none.
        """
        if speed in (None, Speed.FULL.value):
            return self.backend
        if self.twin is None:
            message = "speed is fast, but the encoder here has no static twin: leave it out"
            raise Refusal(400, "speed_not_possible", message, param="speed")
        return self.twin

    async def aclose(self) -> None:
        """Finish accepted texts and release everything."""
        if self.twin is not None:
            await self.twin.aclose()
        await self.backend.aclose()

    async def check_health(self) -> None:
        """Check that inferences succeed: those under way, the last one if it is recent, or else a new one."""
        if self.draining:
            raise unavailable("draining", "this gateway is about to stop")
        idle_s = self.scheduler.idle_s()
        if idle_s is None:
            await self._probe()
        elif idle_s >= PROBE_S:  # a probe would only wait behind these
            raise unavailable("unhealthy", f"no inference has ended in {PROBE_S:g} s")
        if self._problem is not None:
            raise unavailable("unhealthy", "the last inference failed; the gateway's log has the reason")

    async def _probe(self) -> None:
        """Run an inference, unless the last one ended less than a second ago."""
        async with self._probing:
            if time.monotonic() - self._outcome_at >= FRESH_S:
                try:
                    probe = PROBE_TEXT.decode()
                    probes = [(probe, probe) if self.backend.card.scores_pairs else probe]
                    _check_finite(await asyncio.wait_for(self.backend.encode(probes), PROBE_S))
                    self.scheduler.note_progress()
                    self._record_outcome(None)
                except Exception as error:  # any failure means unhealthy
                    self._record_outcome(error)
                    _log.warning("not healthy: %s: %s", type(error).__name__, error)

    def _record_outcome(self, problem: Exception | None) -> None:
        self._problem = problem
        self._outcome_at = time.monotonic()

    def _check(self, count: int, dimensions: int | None, normalize: bool | None) -> None:
        card, settings = self.backend.card, self.settings
        if count > settings.max_batch:
            raise Refusal(
                413, "batch_too_large", f"{count} texts in one request: at most {settings.max_batch}", param="input"
            )
        if dimensions not in (None, *self.dimensions):
            allowed = ", ".join(map(str, self.dimensions))
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
                "normalize is false, but this encoder's vectors always have length 1: leave it out",
                param="normalize",
            )

    @contextmanager
    def _counted(self, texts: int) -> Iterator[None]:
        """Show the texts in flight."""
        self.metrics.in_flight.inc(texts)
        try:
            yield
        finally:
            self.metrics.in_flight.dec(texts)

    def _finish(
        self, served: Served, dimensions: int | None, normalize: bool | None, truncate: bool | None
    ) -> EncodingResult:
        """Apply a request's parameters to its vectors."""
        vectors = served.vectors_or_raise()
        truncated: list[int] = np.flatnonzero(served.truncated).tolist()
        if truncated and truncate is False:
            first = truncated[0]
            raise Refusal(
                413,
                "text_too_long",
                f"text {first} has {served.tokens[first]} tokens, and the encoder's limit is "
                f"{self.backend.card.max_tokens}: shorten it, or leave out truncate=false",
                param="inputs",
            )
        normalized = self.backend.card.normalized
        scale = (normalized if normalize is None else normalize) and (dimensions is not None or not normalized)
        vectors = cut(vectors, dimensions, normalize=scale)
        tokens = int(served.tokens.sum())
        self.metrics.batch.observe(len(served.tokens))
        self.metrics.tokens.inc(tokens)
        self.metrics.truncated.inc(len(truncated))
        return EncodingResult(
            vectors=np.ascontiguousarray(vectors, dtype="<f4"),
            tokens=tokens,
            truncated=truncated,
            fingerprint=served.fingerprint or self.backend.card.fingerprint,
            counts=served.counts,
        )


def _check_finite(served: Served) -> None:
    """Check that vectors are finite: JSON would turn a NaN into null."""
    for error in served.errors.values():
        if isinstance(error, NotFiniteError):
            raise error
    if not np.isfinite(served.vectors).all():
        raise EngineError("the engine returned vectors that are not finite")
