"""The timed metrics of a report, by name: what `benchmarks.compare` holds against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.results import Report


@dataclass(frozen=True)
class Timed:
    """One metric of one run; smaller is better.

    Attributes:
        yardstick: seconds or milliseconds, one a round, of as many samples each: see `benchmarks.yardstick`. Empty
            where there is none.
    """

    metric: str
    unit: str
    samples: Sequence[float]
    yardstick: Sequence[float] = ()

    @property
    def in_yardsticks(self) -> Sequence[float]:
        """The samples, each over the yardstick of its round."""
        rounds = zip(np.array_split(np.asarray(self.samples), len(self.yardstick)), self.yardstick, strict=True)
        return [float(sample) for samples, yardstick in rounds for sample in samples / yardstick]


def timed(report: Report) -> Iterator[Timed]:
    """Give every timed metric of our own; a peer's times are not our regression."""
    for rate in report.throughput:
        yield replace(
            _of_texts(f"throughput, {rate.point.name}", rate.samples_s, rate.texts), yardstick=rate.yardstick_s
        )
    for latency in report.latency:
        name = f"latency, {latency.point.name}, {latency.tokens} tokens"
        yield Timed(name, "ms", latency.samples_ms, latency.yardstick_ms)
    for served in report.serving:
        for loop in served.closed:
            metric = f"serving, {served.name}, {loop.concurrency} x {loop.texts_a_request}"
            yield Timed(metric, "µs a text", [1e6 / rate for rate in loop.rounds_texts_per_s])
    yield from _scaling(report)
    for start in report.startup:
        if start.min_cosine is not None:  # ours
            yield Timed(f"startup, {start.party}", "s", start.samples_s)
    for tuning in report.training:
        yield Timed(f"training, {tuning.party}", "s", [run.seconds for run in tuning.runs])
        yield Timed(f"training error, {tuning.party}", "100 - Spearman", [100 - run.mean for run in tuning.runs])


def _scaling(report: Report) -> Iterator[Timed]:
    for result in report.scaling:
        name = f"scaling, {result.point.name}"
        for size in result.sizes:
            yield _of_texts(f"{name}, {size.texts} texts", size.samples_s, size.texts)
        for limited in result.cores:
            yield _of_texts(f"{name}, {limited.cores} cores", limited.samples_s, limited.texts)
        if (many := result.callers) is not None:
            yield _of_texts(f"{name}, {many.callers} callers", many.callers_samples_s, many.texts)


def _of_texts(metric: str, samples_s: Sequence[float], texts: int) -> Timed:
    return Timed(metric, "µs a text", [sample * 1e6 / texts for sample in samples_s])
