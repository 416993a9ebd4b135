"""Bound the memory that requests hold: bodies that were read, and answers that were not yet sent."""

from __future__ import annotations

from collections import Counter

from mirror_runtime.gateway.errors import overloaded

FREE_BYTES = 65_536
"""Bytes of each request that are not counted, so that small requests pass while large ones fill the buffers."""


class Buffers:
    """Counts the bytes that requests hold, in all and by caller."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.by_caller: Counter[str] = Counter()

    def hold(self, caller: str) -> HeldBytes:
        """Start counting a request's bytes."""
        return HeldBytes(self, caller)


class HeldBytes:
    """The bytes of one request."""

    def __init__(self, buffers: Buffers, caller: str) -> None:
        self.caller = caller
        self._buffers = buffers
        self._bytes = -FREE_BYTES  # counted once positive

    def add(self, more: int) -> None:
        """Count bytes, unless they do not fit. One caller may hold half of all; a request alone may hold any number.

        Raises:
            Refusal: they do not fit now.
        """
        held, limit = self._buffers.by_caller, self._buffers.limit
        counted = max(0, self._bytes)
        grown = max(0, self._bytes + more) - counted
        full = held.total() + grown > limit or held[self.caller] + grown > limit // 2
        if grown and full and held.total() > counted:
            raise overloaded("bodies and answers of other requests fill the gateway's buffers: try again later", None)
        self._bytes += more
        held[self.caller] += grown

    def release(self) -> None:
        """Stop counting the request's bytes."""
        held = self._buffers.by_caller
        held[self.caller] -= max(0, self._bytes)
        self._bytes = -FREE_BYTES
        if not held[self.caller]:
            del held[self.caller]
