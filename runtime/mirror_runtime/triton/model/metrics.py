"""What `embed` tells Prometheus through Triton's metrics port: read once a second, never in a request's way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OUTCOMES = ("admitted", "refused", "expired", "cancelled", "failed")

_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The counters of one moment.

    Attributes:
        requests: by outcome, since the model was loaded.
        tokens: run, since the model was loaded.
        slots: token places run, empty ones included.
        batches: handed to the engine, since the model was loaded.
        in_flight: guessed tokens of requests taken and not answered.
    """

    requests: Mapping[str, int]
    tokens: int
    slots: int
    batches: int
    in_flight: int


class Reporter:
    """Keeps Triton's custom metrics up to date from a thread of its own.

    Args:
        pb_utils: Triton's module.
        labels: of every series: the model's name and version, and the instance.
        read: gives the counters of this moment.
    """

    def __init__(self, pb_utils: Any, labels: Mapping[str, str], read: Callable[[], Reading]) -> None:
        self._read = read
        self._last = Reading(requests={}, tokens=0, slots=0, batches=0, in_flight=0)
        kind = pb_utils.MetricFamily
        self._families = {
            name: kind(name=name, description=text, kind=sort)
            for name, text, sort in (
                ("mirror_requests_total", "Requests by what became of them", kind.COUNTER),
                ("mirror_tokens_total", "Tokens run", kind.COUNTER),
                ("mirror_batches_total", "Batches of packed rows run", kind.COUNTER),
                ("mirror_tokens_in_flight", "Guessed tokens of requests taken and not answered", kind.GAUGE),
                ("mirror_row_fill", "Share of the token places run lately that held a token", kind.GAUGE),
            )
        }
        self._requests = {
            outcome: self._families["mirror_requests_total"].Metric(labels={**labels, "outcome": outcome})
            for outcome in OUTCOMES
        }
        self._tokens, self._batches, self._in_flight, self._fill = (
            self._families[f"mirror_{name}"].Metric(labels=dict(labels))
            for name in ("tokens_total", "batches_total", "tokens_in_flight", "row_fill")
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror-metrics")
        self._thread.start()

    def close(self) -> None:
        """Bring the metrics up to date once more and give them back to Triton."""
        self._over.set()
        self._thread.join()
        # Triton wants the metrics gone before their families.
        del self._requests, self._tokens, self._batches, self._in_flight, self._fill
        self._families.clear()

    def _run(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._update()
        self._update()

    def _update(self) -> None:
        now, last = self._read(), self._last
        if now == last:
            return
        for outcome, metric in self._requests.items():
            if more := now.requests.get(outcome, 0) - last.requests.get(outcome, 0):
                metric.increment(more)
        if more := now.tokens - last.tokens:
            self._tokens.increment(more)
        if more := now.batches - last.batches:
            self._batches.increment(more)
        if slots := now.slots - last.slots:
            self._fill.set((now.tokens - last.tokens) / slots)
        if now.in_flight != last.in_flight:
            self._in_flight.set(now.in_flight)
        self._last = now
