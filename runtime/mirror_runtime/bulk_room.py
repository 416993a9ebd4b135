"""The rule by which large requests leave room for small ones, of the gateway and of the model behind Triton.

A leaf: imports nothing of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SLICE_TOKENS = 256
"""Tokens of a slice, 30 ms of a small encoder on one core. Larger requests are cut into slices."""

SHARED_S = 10.0
"""How long after a small request large ones leave room for the next one."""

BULK_S = 0.02
"""Work of large requests that is then under way at once, in time at the recent rate: the wait that it adds."""


class BulkRoom:
    """How much of large requests may be under way: a moment's work while small requests come, else all that fits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._small_at = -SHARED_S

    def note_small(self) -> None:
        """Note that a small request has come."""
        self._small_at = self._clock()

    def tokens(self, most: int, slice_tokens: int, rate: float) -> int:
        """Return how many tokens may be under way, at most `most`. `rate` is that of late, in tokens a second."""
        if self._clock() - self._small_at >= SHARED_S:
            return most
        return min(most, max(slice_tokens, int(BULK_S * rate)))
