"""Report the counters of `embed` through Triton's metrics port, once a second and outside of requests."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

OUTCOMES = ("admitted", "refused", "expired", "cancelled", "failed")

_EVERY_S = 1.0


class MetricsReporter:
    """Keeps Triton's custom metrics up to date from a thread of its own.

    `take` returns the counters since the model was loaded: requests by outcome, `tokens` run, `slots` (token positions
    run, padding included) and `batches`; and `in_flight`, the estimated tokens of requests accepted and not answered.
    """

    def __init__(self, pb_utils: Any, labels: Mapping[str, str], take: Callable[[], Counter[str]]) -> None:
        self._take = take
        self._last: Counter[str] = Counter()
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
        requests = self._families["mirror_requests_total"]
        self._counters = {outcome: requests.Metric(labels={**labels, "outcome": outcome}) for outcome in OUTCOMES}
        self._counters["tokens"], self._counters["batches"], self._in_flight, self._fill = (
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
        del self._counters, self._in_flight, self._fill
        self._families.clear()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._update()
        self._update()

    def _update(self) -> None:
        now, last = self._take(), self._last
        if now == last:
            return
        for name, metric in self._counters.items():
            if more := now[name] - last[name]:
                metric.increment(more)
        if slots := now["slots"] - last["slots"]:
            self._fill.set((now["tokens"] - last["tokens"]) / slots)
        if now["in_flight"] != last["in_flight"]:
            self._in_flight.set(now["in_flight"])
        self._last = now
