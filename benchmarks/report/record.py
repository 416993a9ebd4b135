"""The record: a report is a flat list of measurements, so a new metric is one more entry and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

SCHEMA_VERSION = 7
"""Of report.json. 1 to 6 had a dataclass a metric."""

Condition: TypeAlias = "str | int | float | bool"


class Better(str, Enum):
    """Which way a metric improves."""

    LOWER = "lower"
    HIGHER = "higher"
    NEITHER = "neither"
    """A fact, such as the bytes that were read: never judged."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One metric of one party under one set of conditions.

    Attributes:
        suite: the question that it answers, such as "latency".
        party: who was measured: "openvino bf16" of ours, "sentence-transformers torch" of others, "machine".
        conditions: what else is fixed, such as {"tokens": 16}. With suite, party and metric it names the measurement.
        metric: such as "time per text".
        unit: of the samples: "s", "ms", "us", "1/s", "B", "GFLOP/s", "" for a share or a cosine.
        samples: one a round, request or text, in the order measured; at least one, all finite.
        better: which way is better.
        reference: seconds of a fixed piece of work beside the samples, one a round (`machine.reference_speed`);
            dividing by it removes the machine's own changes of speed. Empty where there is none.
        count: samples measured; more than `samples` holds where a committed report was thinned.
        figures: exact figures of all samples that a thinned report can no longer compute, such as {"p99": 1.8}.
    """

    suite: str
    party: str
    metric: str
    unit: str
    samples: tuple[float, ...]
    better: Better
    conditions: Mapping[str, Condition] = field(default_factory=lambda: MappingProxyType({}))
    reference: tuple[float, ...] = ()
    count: int = 0
    figures: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def key(self) -> tuple[object, ...]:
        """What names the measurement within a report."""
        return self.suite, self.party, self.metric, tuple(sorted(self.conditions.items()))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What could not be measured, and why."""

    suite: str
    party: str
    reason: str
