"""Report the counters of `embed` through Triton's metrics port, once a second and outside of requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OUTCOMES = ("admitted", "refused", "expired", "cancelled", "failed")

_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The counters at one moment."""

    requests: Mapping[str, int]  # by outcome, since the model was loaded; so are the others
    tokens: int
    slots: int  # token positions run, padding included
    batches: int
    in_flight: int  # estimated tokens of requests that are accepted and not answered


class MetricsReporter:
    """Keeps Triton's custom metrics up to date from a thread of its own."""

    def __init__(self, pb_utils: Any, labels: Mapping[str, str], take: Callable[[], Snapshot]) -> None:
        self._take = take
        self._last = Snapshot(requests={}, tokens=0, slots=0, batches=0, in_flight=0)
        family = pb_utils.MetricFamily
        self._families = {
            name: family(name=name, description=text, kind=kind)
            for name, text, kind in (
                ("mirror_requests_total", "Requests by outcome", family.COUNTER),
                ("mirror_tokens_total", "Tokens run", family.COUNTER),
                ("mirror_batches_total", "Batches of packed rows run", family.COUNTER),
                ("mirror_tokens_in_flight", "Estimated tokens of requests accepted and not answered", family.GAUGE),
                ("mirror_row_fill", "Share of the token positions run lately that held a token", family.GAUGE),
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
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror-metrics")
        self._thread.start()

    def close(self) -> None:
        """Update the metrics once more and release them."""
        self._ended.set()
        self._thread.join()
        # Triton requires that metrics are released before their families.
        del self._requests, self._tokens, self._batches, self._in_flight, self._fill
        self._families.clear()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._update()
        self._update()

    def _update(self) -> None:
        now, last = self._take(), self._last
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
