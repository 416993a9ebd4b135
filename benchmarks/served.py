"""A running Triton as suite `serving` asks it: closed and open loops beside its own statistics."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.load import Caller, Connect, Load, closed_loop, open_loop, requests_of
from benchmarks.serving_results import OpenLoop, ServerTimes
from benchmarks.summary import percentile, thin
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import ServerError
from mirror_runtime.triton.server.server import Server

KEPT_UP = 0.95

OPEN_CALLERS = 64
"""More than are ever under way before the knee; behind it the requests that wait for a caller are late, and count."""

SETTLE_S = 0.1
"""Triton counts a request a moment after it has answered it."""


class Served:
    """A running server as the loops need it.

    Args:
        server: started; its owner stops it.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._url = f"http://127.0.0.1:{server.http_port}/v2"

    def version(self) -> str:
        """Name the server and its version."""
        said = self._ask("")
        return f"{said['name']} {said['version']}"

    def closed(
        self, texts: Sequence[str], concurrency: int, size: int, seconds: float
    ) -> tuple[Load, ServerTimes | None]:
        """Run one closed loop."""
        before = self._counters()
        load = closed_loop(self._connect(), requests_of(texts, size), concurrency=concurrency, seconds=seconds)
        return load, self._times(before)

    def open(self, texts: Sequence[str], rate: float, seconds: float, seed: int) -> OpenLoop:
        """Run one open loop."""
        before = self._counters()
        load, count = open_loop(self._connect(), texts, rate=rate, seconds=seconds, callers=OPEN_CALLERS, seed=seed)
        offered = count / seconds
        achieved = len(load.samples_ms) / max(load.wall_s, seconds)
        return OpenLoop(
            offered_per_s=offered,
            achieved_per_s=achieved,
            requests=len(load.samples_ms),
            samples_ms=thin(load.samples_ms),
            p50_ms=percentile(load.samples_ms, 50),
            p90_ms=percentile(load.samples_ms, 90),
            p99_ms=percentile(load.samples_ms, 99),
            p999_ms=percentile(load.samples_ms, 99.9),
            errors=load.errors,
            unsent=load.unsent,
            kept_up=achieved >= KEPT_UP * offered and not load.unsent,
            server=self._times(before),
        )

    def _connect(self) -> Connect:
        def connect() -> AbstractContextManager[Caller]:
            return self._server.client("grpc")

        return connect

    def _counters(self) -> Mapping[str, int]:
        time.sleep(SETTLE_S)
        stats = self._ask(f"/models/{MODEL_NAME}/stats")["model_stats"][0]
        times = stats["inference_stats"]
        compute = sum(times[part]["ns"] for part in ("compute_input", "compute_infer", "compute_output"))
        return {
            "texts": stats["inference_count"],
            "executions": stats["execution_count"],
            "requests": times["success"]["count"],
            "queue_ns": times["queue"]["ns"],
            "compute_ns": compute,
        }

    def _times(self, before: Mapping[str, int]) -> ServerTimes | None:
        gained = {name: value - before[name] for name, value in self._counters().items()}
        if not gained["requests"] or not gained["executions"]:
            return None
        return ServerTimes(
            queue_ms=gained["queue_ns"] / gained["requests"] / 1e6,
            compute_ms=gained["compute_ns"] / gained["requests"] / 1e6,
            texts_per_execution=gained["texts"] / gained["executions"],
        )

    def _ask(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self._url + path, timeout=10) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:
            raise ServerError(f"the server's {self._url + path} cannot be read: {error}") from error
