"""report.json: facts, a flat list of measurements and the failures, in one strict schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.facts import Facts
from benchmarks.report.record import SCHEMA_VERSION, Condition, Failure, Measurement
from benchmarks.report.statistics import FIGURES
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.folders import replace_file
from mirror_runtime.strict_json import from_json, read_object, to_json

REPORT_FILE = "report.json"

MOST_KEPT = 100
"""Samples that a report keeps of a measurement: load tests take tens of thousands, and reports are committed."""

DEFAULTS: Mapping[str, Any] = {"conditions": {}, "reference": [], "count": 0, "figures": {}}
"""Keys of a measurement that the file leaves out where they are empty."""


MUST_AGREE = {
    "bundle's fingerprint": attrgetter("subject.fingerprint"),
    "workload": attrgetter("workload.texts_sha256"),
    "settings": attrgetter("settings"),
    "processor": attrgetter("host.cpu_model", "host.cores_online", "host.cores_usable"),
    "memory and Python": attrgetter("host.memory_bytes", "host.python"),
    "versions": attrgetter("versions"),
    "commit": attrgetter("source.commit"),
}
"""What must be equal for an interrupted run to continue."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of `report.json`."""

    facts: Facts
    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]

    def select(self, suite: str, metric: str = "", **wanted: Condition) -> list[Measurement]:
        """Return the measurements of a suite with a metric (any if empty) and these conditions or party, in order."""
        found = [one for one in self.measurements if one.suite == suite and metric in ("", one.metric)]
        return [one for one in found if wanted.items() <= one.attributes.items()]

    def library(self, party: str) -> str:
        """Return the title of the other library whose name a party begins with; empty for ours."""
        return next((title for title in self.facts.settings.peers if party.startswith(f"{title} ")), "")


def read_report(folder: Path) -> Report:
    """Read `report.json` of a report folder, strictly.

    Raises:
        InputError: the file is missing, malformed, or of another schema version; the message names file and cause.
    """
    path = folder / REPORT_FILE
    try:
        data = read_object(path, "not a report")
        if (version := data.pop("schema_version", None)) != SCHEMA_VERSION:
            raise InputError(f"{path} has schema_version {version!r}; this program reads {SCHEMA_VERSION}")
        items = data.get("measurements")
        if isinstance(items, list):
            data["measurements"] = [{**DEFAULTS, **item} if isinstance(item, dict) else item for item in items]
        report = from_json(Report, data, str(path))
    except BundleError as error:
        raise InputError(str(error)) from error
    seen = set()
    for at, one in enumerate(report.measurements):
        where = f"{path}: measurements[{at}]"
        if not one.samples or not np.isfinite((*one.samples, *one.reference, *one.figures.values())).all():
            raise InputError(f"{where} has no samples, or one that is not finite")
        if one.key in seen:
            raise InputError(f"{where} repeats an earlier one: {one.key}")
        seen.add(one.key)
    return report


def resumed_report(folder: Path, facts: Facts) -> Report:
    """Return the report that an interrupted run left, after a check that the run of `facts` is the same one."""
    report = read_report(folder)
    for what, of in MUST_AGREE.items():
        if (then := of(report.facts)) != (now := of(facts)):
            raise InputError(f"--resume: the {what} of the interrupted run was {then}, now it is {now}: start anew")
    return replace(report, facts=replace(report.facts, resumed=(*report.facts.resumed, facts.started)))


def write_report(report: Report, path: Path) -> None:
    """Write `report.json`, whole or not at all, with measurements of many samples thinned."""
    kept = (to_json(thin(one)) for one in report.measurements)
    measured = [{key: value for key, value in one.items() if DEFAULTS.get(key) != value} for one in kept]
    failures = [to_json(failure) for failure in report.failures]
    with replace_file(path) as beside:
        facts = {"schema_version": SCHEMA_VERSION, "facts": to_json(report.facts)}
        write_object(beside, {**facts, "measurements": measured, "failures": failures})


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


def thin(measurement: Measurement) -> Measurement:
    """Keep at most `MOST_KEPT` samples at evenly spaced ranks, the extremes among them, and the exact figures of all.

    Rounds that were timed beside a reference are thinned one by one, so that they still pair with it. Samples without
    a unit, such as the cosines of scored pairs, pair with those of other measurements and are never thinned.
    """
    if len(measurement.samples) <= MOST_KEPT or not measurement.unit:
        return measurement
    rounds = np.array_split(np.asarray(measurement.samples, np.float64), max(1, len(measurement.reference)))
    most = max(2, MOST_KEPT // len(rounds))
    ranks = [np.linspace(0, one.size - 1, min(most, one.size)).round().astype(np.int64) for one in rounds]
    kept = [value for one, places in zip(rounds, ranks, strict=True) for value in np.sort(one)[places]]
    return replace(
        measurement,
        samples=tuple(float(f"{value:.5g}") for value in kept),
        count=measurement.total,
        figures={name: measurement.figure(name) for name in (*FIGURES, "mean", *measurement.figures)},
    )
