"""The Prometheus metrics of a gateway."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mirror_runtime.gateway.backends import ModelCard
from mirror_runtime.vector_cache import VectorCache

__all__ = ["CONTENT_TYPE", "GatewayMetrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class GatewayMetrics:
    """The counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.answered = 0  # requests so far
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "mirror_gateway_requests", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "mirror_gateway_request_seconds",
            "From a request's headers to its answer's last byte.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "mirror_gateway_request_texts", "Texts per request.", buckets=_TEXTS, registry=self.registry
        )
        self.tokens = Counter("mirror_gateway_tokens", "Tokens of answered texts.", registry=self.registry)
        self.truncated = Counter("mirror_gateway_truncated_texts", "Texts that were truncated.", registry=self.registry)
        self.refused = Counter(
            "mirror_gateway_refusals", "Requests for vectors that were refused.", ("code",), registry=self.registry
        )
        self.in_flight = Gauge(
            "mirror_gateway_texts_in_flight", "Texts accepted and not yet answered.", registry=self.registry
        )
        self.connections = Gauge("mirror_gateway_connections", "Open connections.", registry=self.registry)
        self.dropped = Counter(
            "mirror_gateway_connections_dropped",
            "Connections that the gateway ended.",
            ("reason",),
            registry=self.registry,
        )
        self._info = Info("mirror_gateway", "The served model.", registry=self.registry)

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self.answered += 1
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def show_cache(self, cache: VectorCache) -> None:
        """Show a cache's counters, too."""
        self.registry.register(_CacheMetrics(cache))

    def page(self, card: ModelCard) -> bytes:
        """Render the page that Prometheus scrapes."""
        self._info.info({"fingerprint": card.fingerprint, "engine": card.engine, "precision": card.precision})
        return generate_latest(self.registry)


class _CacheMetrics(Collector):
    def __init__(self, cache: VectorCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        """Read the counters of the cache, once for each page."""
        now, name = self._cache.stats, "mirror_gateway_cache"
        yield CounterMetricFamily(f"{name}_hits", "Texts that the vector cache had.", now.hits)
        yield CounterMetricFamily(f"{name}_misses", "Texts that it had not.", now.misses)
        yield GaugeMetricFamily(f"{name}_entries", "Vectors in it.", now.entries)
        yield GaugeMetricFamily(f"{name}_bytes", "What they take.", now.bytes)
