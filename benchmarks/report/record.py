"""The record: a report is a flat list of measurements, so a new metric is one more entry and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np

from benchmarks.report.statistics import FIGURES, percentile

SCHEMA_VERSION = 7  # of report.json; versions 1 to 6 had a dataclass for each metric

PEOPLE = "people"
"""Party of a suite whose samples are people's scores: those of other parties under the same conditions, such as the
cosines of scored pairs, are judged by their rank correlation with them."""

Condition: TypeAlias = str | int | float | bool


class Better(str, Enum):
    """Which way a metric improves."""

    LOWER = "lower"
    HIGHER = "higher"
    NEITHER = "neither"  # a fact, such as the bytes that were read: never judged by `compare.py`


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One metric of one party under one set of conditions.

    Attributes:
        suite: the question that it answers, such as "latency".
        party: who was measured: "openvino bf16" of ours, "sentence-transformers torch" of others, "machine".
        samples: one per round, request or text, in the order measured; at least one, all finite.
        unit: "s", "ms", "us", "1/s", "B", "GFLOP/s", "" for a share or a cosine.
        conditions: what else is fixed, such as {"tokens": 16}. With suite, party and metric it names the measurement.
        reference: seconds of a fixed piece of work beside the samples, one per round (`machine.ceilings`);
            dividing by it removes the machine's own changes of speed. Empty where there is none.
        count: samples measured, where a thinned report holds fewer; else 0.
        figures: exact figures that the samples no longer yield, such as {"p99": 1.8} of a thinned measurement, or
            {"low": 1.1, "high": 1.3} of an interval.
    """

    suite: str
    party: str
    metric: str
    unit: str
    samples: tuple[float, ...]
    better: Better
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    reference: tuple[float, ...] = ()
    count: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """What names the measurement within a report."""
        return self.suite, self.party, self.metric, tuple(sorted(self.conditions.items()))

    @property
    def attributes(self) -> dict[str, Condition]:
        """The conditions, and the party among them."""
        return {"party": self.party, **self.conditions}

    @property
    def total(self) -> int:
        """Number of samples measured."""
        return self.count or len(self.samples)

    @property
    def median(self) -> float:
        """The median of all samples."""
        return self.figure("p50")

    def figure(self, name: str) -> float:
        """Return a figure of all samples: one of `figures`, of `statistics.FIGURES`, "mean" or "sum"."""
        if name in self.figures:
            return self.figures[name]
        if name in ("mean", "sum"):
            return float(getattr(np, name)(self.samples))
        return percentile(self.samples, FIGURES[name])


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A party, or a part of its measurements, that could not be measured, with the reason."""

    suite: str
    party: str
    reason: str
