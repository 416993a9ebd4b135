"""Callers of a server: a closed loop, and an open one whose arrivals do not wait for answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mirror_runtime.errors import ServerError

GRACE_S = 0.2
"""Between the last caller being ready and the first request."""

OVERTIME = 1.5
"""An open loop gives up requests that could not be sent by this multiple of its time."""


class Caller(Protocol):
    """What sends a request; `mirror_runtime.triton.Client` is one."""

    def encode(self, texts: Sequence[str], batch_size: int) -> object:
        """Send texts in one request and wait for their vectors."""


Connect = Callable[[], AbstractContextManager[Caller]]


@dataclass(kw_only=True)
class Load:
    """What the callers saw.

    Attributes:
        samples_ms: of requests that were answered.
        errors: requests that failed.
        unsent: requests of an open loop that were given up.
        wall_s: from the first moment of the loop to the last answer.
        reason: of the first failure.
    """

    samples_ms: list[float] = field(default_factory=list)
    errors: int = 0
    unsent: int = 0
    wall_s: float = 0.0
    reason: str = ""


def requests_of(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    """Cut texts into requests of one size; what is left at the end is left out, unless it is all there is."""
    return [texts[at : at + size] for at in range(0, max(1, len(texts) - size + 1), size)]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Draw the moments, in seconds and in order, at which requests arrive at random, `rate` a second on average.

    A Poisson process of which it is known how many arrive: as many for every seed, at least one.
    """
    moments = np.random.default_rng(seed).uniform(0, seconds, size=max(1, round(rate * seconds)))
    drawn: list[float] = np.sort(moments).tolist()
    return drawn


def closed_loop(connect: Connect, requests: Sequence[Sequence[str]], *, concurrency: int, seconds: float) -> Load:
    """Let `concurrency` callers send one request after another for some seconds.

    A request that is under way at the end is waited for and counted, and so is its time.

    Args:
        connect: makes a caller's own connection.
        requests: texts of each; every caller goes round them from a place of its own.
        concurrency: callers.
        seconds: for how long requests are started.

    Raises:
        ServerError: no request was answered.
    """

    def calls(caller: Caller, number: int, began: float, record: _Recorder) -> None:
        at = number * len(requests) // concurrency
        while not record.stopped and time.perf_counter() < began + seconds:
            record.request(caller, requests[at % len(requests)], time.perf_counter())
            at += 1

    return _run(connect, calls, concurrency, warm=requests[0])


def open_loop(
    connect: Connect, texts: Sequence[str], *, rate: float, seconds: float, callers: int, seed: int
) -> tuple[Load, int]:
    """Send single texts at random moments, `rate` a second on average, whether or not earlier ones are answered.

    Each request's time counts from the moment it was to be sent: where all callers wait for a slow server, the requests
    that could not be sent meanwhile are late, and say so (no coordinated omission).

    Returns:
        What the callers saw, and how many requests were to be sent.

    Raises:
        ServerError: no request was answered.
    """
    due = arrivals(rate, seconds, seed)
    coming = iter(enumerate(due))
    lock = threading.Lock()

    def calls(caller: Caller, _number: int, began: float, record: _Recorder) -> None:
        while not record.stopped:
            with lock:
                at, moment = next(coming, (-1, 0.0))
            if at < 0:
                return
            now = time.perf_counter() - began
            if now > OVERTIME * seconds:
                record.give_up()
                continue
            if moment > now:
                time.sleep(moment - now)
            record.request(caller, [texts[at % len(texts)]], began + moment)

    return _run(connect, calls, callers, warm=[texts[0]]), len(due)


class _Recorder:
    """Collects what every caller saw, and tells them to stop."""

    def __init__(self) -> None:
        self.load = Load()
        self.last_answer = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def request(self, caller: Caller, texts: Sequence[str], since: float) -> None:
        """Send one request; its time runs from `since`."""
        try:
            caller.encode(texts, batch_size=len(texts))
        except ServerError as error:
            self.failed(error)
            return
        ended = time.perf_counter()
        with self._lock:
            self.load.samples_ms.append(1e3 * (ended - since))
            self.last_answer = max(self.last_answer, ended)

    def failed(self, error: Exception) -> None:
        with self._lock:
            self.load.errors += 1
            self.load.reason = self.load.reason or str(error)
        if not self.load.samples_ms:
            self.stop()  # nothing works: asking on would only fill the log

    def give_up(self) -> None:
        with self._lock:
            self.load.unsent += 1


def _run(
    connect: Connect, calls: Callable[[Caller, int, float, _Recorder], None], count: int, *, warm: Sequence[str]
) -> Load:
    """Start callers, let them connect and warm up, then run `calls` in each from one common moment."""
    record, began = _Recorder(), [0.0]

    def common_moment() -> None:
        began[0] = time.perf_counter() + GRACE_S

    ready = threading.Barrier(count, action=common_moment)

    def work(number: int) -> None:
        try:
            with connect() as caller:
                caller.encode(warm, batch_size=len(warm))
                ready.wait()
                time.sleep(max(0.0, began[0] - time.perf_counter()))
                calls(caller, number, began[0], record)
        except threading.BrokenBarrierError:
            return  # another caller could not connect, and has said so
        except ServerError as error:
            record.failed(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C: every caller ends after the request it is waiting for
        record.stop()
        ready.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    load = record.load
    if not load.samples_ms:
        raise ServerError(f"no request was answered: {load.reason}")
    load.wall_s = record.last_answer - began[0]
    return load
