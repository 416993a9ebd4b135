"""Where suites leave what they measured: kept in memory, and written one file a suite as soon as the suite is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.report.record import Better, Condition, Failure, Measurement
from mirror_runtime.errors import MirrorError


@dataclass(kw_only=True)
class Recorder:
    """Measurements and failures so far.

    A measurement replaces an earlier one of the same key, so a suite may add after every round and an interrupt finds
    what is finished.
    """

    _measurements: dict[tuple[object, ...], Measurement] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """All measurements in the order in which their keys were first added."""
        return tuple(self._measurements.values())

    def snapshot(self) -> Recorder:
        """Return a copy, to find what is added after it."""
        return Recorder(_measurements=dict(self._measurements), failures=list(self.failures))

    def added_since(self, before: Recorder) -> Recorder:
        """Return what was added after a snapshot, replaced measurements included."""
        added = {
            key: one for key, one in self._measurements.items() if before._measurements.get(key) is not one
        }  # fmt: skip
        return Recorder(_measurements=added, failures=self.failures[len(before.failures) :])

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement, in place of an earlier one of the same key."""
        self._measurements[measurement.key] = measurement

    def record(
        self,
        suite: str,
        party: str,
        metric: str,
        *samples: float,
        unit: str = "",
        better: Better = Better.NEITHER,
        conditions: Mapping[str, Condition] | None = None,
        reference: Sequence[float] = (),
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Keep a new measurement; without a direction of improvement it is a fact that `compare.py` does not judge."""
        self.add(
            Measurement(
                suite=suite, party=party, metric=metric, unit=unit, samples=tuple(map(float, samples)), better=better,
                conditions=conditions or {}, reference=tuple(reference), figures=figures or {},
            )
        )  # fmt: skip

    def fail(self, suite: str, party: str, reason: object) -> None:
        """Keep what could not be measured; the reason goes into the report as text."""
        self.failures.append(Failure(suite=suite, party=party, reason=str(reason)))

    @contextmanager
    def failing(self, suite: str, party: str, *others: type[Exception]) -> Iterator[None]:
        """Keep a `MirrorError` of the block, or one of the others, as a failure instead of raising it."""
        kinds: tuple[type[Exception], ...] = (MirrorError, *others)
        try:
            yield
        except kinds as error:
            self.fail(suite, party, error)
