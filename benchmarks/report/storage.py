"""report.json: facts, a flat list of measurements and the failures, in one strict schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.facts import Facts
from benchmarks.report.record import PEOPLE, SCHEMA_VERSION, Condition, Failure, Measurement
from benchmarks.report.statistics import FIGURES
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.strict_json import from_json, to_json

T = TypeVar("T")

REPORT_FILE = "report.json"

MOST_KEPT = 100
"""Samples that a report keeps of a measurement: load tests take tens of thousands, and reports are committed."""

DEFAULTS: Mapping[str, Any] = {"conditions": {}, "reference": [], "count": 0, "figures": {}}
"""Keys of a measurement that the file leaves out where they are empty."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of `report.json`."""

    facts: Facts
    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]

    def select(self, suite: str, metric: str = "", **conditions: Condition) -> list[Measurement]:
        """Return the measurements of a suite with a metric (any if empty) and these conditions, in their order."""
        return [
            one
            for one in self.measurements
            if one.suite == suite
            and metric in ("", one.metric)
            and all(one.conditions.get(name) == value for name, value in conditions.items())
        ]

    @property
    def rate_suite(self) -> str:
        """The suite by whose rates parties are compared: "peers" if present, whose rounds interleave all parties."""
        return "peers" if self.select("peers", "texts per second") else "throughput"

    @property
    def measured(self) -> bool:
        """Whether a suite has a figure; ceilings and the bundle's own facts do not count."""
        return any(one.suite not in ("bundle", "ceilings") and one.party != PEOPLE for one in self.measurements)

    def is_peer(self, party: str) -> bool:
        """Return whether a party is another library: its name begins with the title of one."""
        return any(party.startswith(f"{title} ") for title in self.facts.settings.peers)


def read_report(folder: Path) -> Report:
    """Read `report.json` of a report folder, strictly.

    Raises:
        InputError: the file is missing, malformed, or of another schema version; the message names file and cause.
    """
    path = folder / REPORT_FILE
    data = read_object(path)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path} has schema_version {version!r}; this program reads {SCHEMA_VERSION}")
    if unknown := sorted(data.keys() - {"schema_version", "facts", "measurements", "failures"}):
        raise InputError(f"{path}: unknown {', '.join(unknown)}")
    return Report(facts=read_facts(data, path), **read_measured(data, path))


def read_facts(data: Mapping[str, Any], path: Path) -> Facts:
    """Read the facts of a JSON object, strictly.

    Raises:
        InputError: they are malformed.
    """
    return _strict(Facts, data.get("facts"), f"{path}: facts")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        InputError: the file cannot be read or has something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a report: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} cannot be read as a report: a JSON object is expected")
    return data


def read_measured(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read the measurements and failures of a JSON object, strictly.

    Raises:
        InputError: one is malformed, not finite, has no samples, or stands there twice.
    """
    for name in ("measurements", "failures"):
        if not isinstance(data.get(name), list):
            raise InputError(f"{path}: {name} is not a list")
    measurements = []
    seen = set()
    for at, item in enumerate(data["measurements"]):
        where = f"{path}: measurements[{at}]"
        one = _strict(Measurement, {**DEFAULTS, **item} if isinstance(item, dict) else item, where)
        numbers = (*one.samples, *one.reference, *one.figures.values())
        if not one.samples or not np.isfinite(numbers).all():
            raise InputError(f"{where} has no samples, or one that is not finite")
        if one.key in seen:
            raise InputError(f"{where} repeats an earlier one: {one.key}")
        seen.add(one.key)
        measurements.append(one)
    failures = [_strict(Failure, one, f"{path}: failures[{at}]") for at, one in enumerate(data["failures"])]
    return {"measurements": tuple(measurements), "failures": tuple(failures)}


def write_report(report: Report, path: Path) -> None:
    """Write `report.json`."""
    measured = measured_json(report.measurements, report.failures)
    write_object(path, {"schema_version": SCHEMA_VERSION, "facts": to_json(report.facts), **measured})


def measured_json(measurements: Iterable[Measurement], failures: Iterable[Failure]) -> dict[str, Any]:
    """Turn measurements, thinned where they are many, and failures into what `json.dumps` takes."""
    return {"measurements": [_compact(thin(one)) for one in measurements], "failures": [to_json(f) for f in failures]}


def write_object(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object with one line for each item of its lists."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list):
            items = ",\n".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value)
            text = f"[\n{items}\n]" if value else "[]"
        else:
            text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        parts.append(f"{json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def thin(measurement: Measurement, most: int = MOST_KEPT) -> Measurement:
    """Keep at most so many samples at evenly spaced ranks, the extremes among them, and the exact figures of all.

    Rounds that were timed beside a reference are thinned one by one, so that they still pair with it. Samples without
    a unit, such as the cosines of scored pairs, pair with those of other measurements and are never thinned.
    """
    if len(measurement.samples) <= most or not measurement.unit:
        return measurement
    rounds = np.array_split(np.asarray(measurement.samples, np.float64), max(1, len(measurement.reference)))
    kept = np.concatenate([_ranks(np.sort(samples), max(2, most // len(rounds))) for samples in rounds])
    exact = {name: float(np.percentile(measurement.samples, q)) for name, q in FIGURES.items()}
    return replace(
        measurement,
        samples=tuple(float(f"{value:.5g}") for value in kept),
        count=measurement.total,
        figures={**exact, "mean": float(np.mean(measurement.samples)), **measurement.figures},
    )


def _ranks(ordered: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    return ordered[np.linspace(0, ordered.size - 1, min(most, ordered.size)).round().astype(np.int64)]


def _compact(measurement: Measurement) -> dict[str, Any]:
    data = to_json(replace(measurement, count=0) if measurement.count == len(measurement.samples) else measurement)
    return {key: value for key, value in data.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def _strict(kind: type[T], data: Any, where: str) -> T:
    try:
        return from_json(kind, data, where)
    except BundleError as error:
        raise InputError(str(error)) from error
