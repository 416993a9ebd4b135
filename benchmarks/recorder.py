"""Where suites leave what they measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from benchmarks.report.record import Better, Condition, Failure, Measurement
from mirror_runtime.errors import MirrorError


class Recorder:
    """Measurements and failures so far.

    A measurement replaces an earlier one of the same key, so a suite may add after every round and an interrupt finds
    what is finished.
    """

    def __init__(self, earlier: Iterable[Measurement] = ()) -> None:
        self._measurements = {one.key: one for one in earlier}
        self.failures: list[Failure] = []

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """All measurements in the order in which their keys were first added."""
        return tuple(self._measurements.values())

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
