"""Fair use of a backend: requests are cut into slices, which take turns in lanes.

    request ──slices──▶ small │ bulk │ long ──▶ backend ──▶ joined result

A request of one slice goes to the lane `small`, the slices of a larger one to `bulk`, and a very long text to `long`.
Each lane has room of its own at the backend, so that no request waits behind all of a larger one; within a lane,
callers have equal shares.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mirror_runtime.async_encoder import estimate_tokens
from mirror_runtime.bulk_room import BulkRoom
from mirror_runtime.client.exchange import REPLACEMENTS, Served
from mirror_runtime.encoded import joined
from mirror_runtime.gateway.backends import EncodingBackend
from mirror_runtime.gateway.errors import overloaded, unavailable
from mirror_runtime.gateway.fair_queue import FairQueue
from mirror_runtime.retry_after import RetryEstimator
from mirror_runtime.tokenizer import LONG_CHARACTERS, Item, characters

CHARACTERS_TOKENISED = 32
"""Characters that are tokenised in the time of one token in a small CPU encoder."""


@dataclass(frozen=True)
class Slice:
    """Consecutive texts of a request."""

    start: int
    stop: int
    tokens: int  # estimated, after truncation, and what tokenising costs
    long: bool  # whether it is one very long text


class Scheduler:
    """Encodes requests of many callers.

    Attributes:
        load: the tokens in flight, and their rate.
    """

    def __init__(self, backend: EncodingBackend, max_texts: int) -> None:
        self.load = RetryEstimator()
        self._backend = backend
        self._max_texts = max_texts
        self._small = FairQueue(lambda: backend.tokens_at_once, max_texts)
        self._bulk = FairQueue(self._bulk_tokens, max_texts)
        self._long = FairQueue(lambda: 1, max_texts)  # one at a time
        self._bulk_room = BulkRoom()
        self._progress_at = 0.0
        self._stuck_s = 0.0  # that inferences had been under way without an end when the last of them was cancelled

    @property
    def texts(self) -> int:
        """Texts accepted and not yet encoded."""
        return self._small.texts + self._bulk.texts

    def idle_s(self) -> float | None:
        """Return for how long inferences have been under way and none has ended; None if none is under way.

        Those of very long texts do not count. One that was cancelled has not ended.
        """
        return time.monotonic() - self._progress_at if self._small.running or self._bulk.running else None

    async def encode(self, texts: Sequence[Item], caller: str) -> Served:
        """Encode a request's texts, all with one model. Cancelling drops the slices that have not started.

        Raises:
            Refusal: too many texts are accepted already.
            MirrorError: the backend's errors.
        """
        slices = list(self._cut(texts))
        small = len(slices) == 1 and not slices[0].long
        queue = self._small if small else self._bulk
        self._check_room(queue, len(texts), caller)
        with queue.admitted(caller, len(texts)):
            if small:
                self._bulk_room.note_small()
                return await self._encode_slice(texts, slices[0], self._small, caller)
            parts: dict[int, Served] = {}
            for _ in range(REPLACEMENTS + 1):
                missing = [one for one in slices if one.start not in parts]
                parts.update(zip((one.start for one in missing), await self._all(texts, missing, caller), strict=True))
                newest = _fingerprint(reversed(parts.values()))
                parts = {start: part for start, part in parts.items() if part.fingerprint in (None, newest)}
                if len(parts) == len(slices):
                    inner = [parts[start] for start in sorted(parts)]
                    return Served(**vars(joined(inner)) | {"fingerprint": _fingerprint(inner)})
        raise unavailable("backend_unavailable", "the model was replaced again and again: try again later")

    def _cut(self, texts: Sequence[Item]) -> Iterator[Slice]:
        """Cut a request into slices of the backend's size or one text."""
        most = self._backend.card.most_tokens
        start = tokens = 0
        for at, text in enumerate(texts):
            long = characters(text) > LONG_CHARACTERS
            more = estimate_tokens(text) if most is None else min(estimate_tokens(text), most)
            more += characters(text) // CHARACTERS_TOKENISED
            if at > start and (long or tokens + more > self._backend.slice_tokens):
                yield Slice(start, at, tokens, long=False)
                start, tokens = at, 0
            tokens += more
            if long:
                yield Slice(at, at + 1, tokens, long=True)
                start, tokens = at + 1, 0
        if start < len(texts):
            yield Slice(start, len(texts), tokens, long=False)

    def check_room_for_large(self, texts: int, caller: str) -> None:
        """Refuse a large request of up to so many texts before its body has been read and parsed.

        Raises:
            Refusal: it may not fit.
        """
        self._check_room(self._bulk, texts, caller)

    def _check_room(self, queue: FairQueue, texts: int, caller: str) -> None:
        if not queue.fits(caller, texts):
            raise overloaded(
                f"{queue.texts} texts are being encoded and {texts} more would exceed {self._max_texts}: try again "
                "later",
                self.load.retry_after_s(),
            )

    def _bulk_tokens(self) -> int:
        """Return how many tokens of large requests may be at the backend now."""
        backend = self._backend
        return self._bulk_room.tokens(backend.tokens_at_once, backend.slice_tokens, self.load.rate)

    async def _all(self, texts: Sequence[Item], slices: Sequence[Slice], caller: str) -> Sequence[Served]:
        """Encode slices, and cancel all if one fails."""
        lanes = (self._long if one.long else self._bulk for one in slices)
        pairs = zip(slices, lanes, strict=True)
        tasks = [asyncio.ensure_future(self._encode_slice(texts, one, lane, caller)) for one, lane in pairs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _encode_slice(self, texts: Sequence[Item], one: Slice, lane: FairQueue, caller: str) -> Served:
        """Encode a slice in its turn."""
        self.load.enter(one.tokens)
        done = self.load.drop  # cancelled and failed ones do not count for the rate
        try:
            async with lane.turn(caller, one.tokens):
                with self._watched(one):
                    served = await self._backend.encode(texts[one.start : one.stop])
            done = self.load.finish
            return served
        finally:
            done(one.tokens)

    @contextmanager
    def _watched(self, one: Slice) -> Iterator[None]:
        """Note whether an inference ends. Time without any under way does not count."""
        if one.long:
            yield
            return
        if self._small.running + self._bulk.running == one.tokens:
            self._progress_at = time.monotonic() - self._stuck_s
        try:
            yield
            self.note_progress()
        except Exception:  # a failure is an end too, a cancellation is not
            self.note_progress()
            raise
        finally:
            self._stuck_s = time.monotonic() - self._progress_at

    def note_progress(self) -> None:
        """Note that an inference has ended."""
        self._progress_at = time.monotonic()
        self._stuck_s = 0.0


def _fingerprint(parts: Iterable[Served]) -> str | None:
    """Return the first fingerprint. Of a slice of rejected texts nothing was sent, and it has none."""
    return next((part.fingerprint for part in parts if part.fingerprint is not None), None)
