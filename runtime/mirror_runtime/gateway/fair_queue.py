"""Weighted fair queueing: callers get equal shares of a backend, whatever the size and number of their requests."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count

_REMEMBERED = 1024
"""Callers whose times are kept before those that have passed are dropped."""


class FairQueue:
    """Slices of work take turns: of those that wait, the one with the smallest virtual finish time is next.

    The virtual time is that of the slice that started last, as in self-clocked fair queueing (Golestani, 1994): a
    caller's slice finishes its cost after the caller's slice before it, or after now if there is none.

    Args:
        capacity: returns the cost that may run at once now. A slice of a higher cost runs alone.
        max_texts: texts that may be admitted at once.

    Attributes:
        running: cost that runs now.
    """

    def __init__(self, capacity: Callable[[], int], max_texts: int) -> None:
        self._capacity = capacity
        self.running = 0
        self._max_texts = max_texts
        self._texts: Counter[str] = Counter()  # admitted, by caller
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._cancelled = 0  # slices, since they were last taken out of the heap
        self._order = count()  # equal times go in order of arrival
        self._now = 0
        self._finish: dict[str, int] = {}

    @property
    def texts(self) -> int:
        """Texts that are admitted now."""
        return self._texts.total()

    def fits(self, caller: str, texts: int) -> bool:
        """Return whether a request's texts can be admitted.

        When the queue is full, a caller is still admitted up to an equal share: nobody can keep the others out.
        """
        share = self._max_texts // len({*self._texts, caller})
        return self.texts + texts <= self._max_texts or self._texts[caller] + texts <= share

    @contextmanager
    def admitted(self, caller: str, texts: int) -> Iterator[None]:
        """Count a request's texts as admitted for the block."""
        self._texts[caller] += texts
        try:
            yield
        finally:
            self._texts[caller] -= texts
            if not self._texts[caller]:
                del self._texts[caller]

    @asynccontextmanager
    async def turn(self, caller: str, cost: int) -> AsyncIterator[None]:
        """Wait for a slice's turn, and count its cost as running during the block."""
        self._finish[caller] = finish = max(self._now, self._finish.get(caller, 0)) + cost
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (finish, next(self._order), cost, started))
        self._start()
        try:
            await started
            yield
        finally:
            if started.done() and not started.cancelled():
                self.running -= cost
            else:
                self._forget(caller, cost, started)
            self._start()

    def _forget(self, caller: str, cost: int, started: asyncio.Future[None]) -> None:
        """Take a slice that waited out of the queue, and its cost off its caller's time."""
        started.cancel()
        if caller in self._finish:
            self._finish[caller] -= cost
        self._cancelled += 1
        if 2 * self._cancelled > len(self._waiting):  # so rarely that a cancellation costs little on average
            self._waiting = [one for one in self._waiting if not one[3].done()]
            heapq.heapify(self._waiting)
            self._cancelled = 0

    def _start(self) -> None:
        """Start waiting slices while there is room."""
        while self._waiting:
            finish, _, cost, started = self._waiting[0]
            if not started.done():  # else its request was cancelled
                if self.running and self.running + cost > self._capacity():
                    break
                self._now = finish
                self.running += cost
                started.set_result(None)
            heapq.heappop(self._waiting)
        if not self.running or len(self._finish) > _REMEMBERED:
            self._finish = {caller: finish for caller, finish in self._finish.items() if finish > self._now}
