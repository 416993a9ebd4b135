"""Interrupted runs continue where they stopped: every finished suite is a file beside the report's folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.recorder import Recorder
from benchmarks.report.facts import Facts
from benchmarks.report.record import SCHEMA_VERSION
from benchmarks.report.storage import measured_json, read_facts, read_measured, read_object, write_object
from mirror_runtime.errors import InputError
from mirror_runtime.strict_json import to_json

RUN_FILE = "run.json"


class Unfinished:
    """The finished suites of a run, in a folder that is deleted when the run is complete.

    Args:
        output: folder of the report.
    """

    def __init__(self, output: Path) -> None:
        output = output.absolute()
        self.folder = output.with_name(f"{output.name}.unfinished")

    def start(self, facts: Facts) -> None:
        """Begin a new run; what an interrupted one left is deleted.

        Raises:
            InputError: the folder has something else.
        """
        if self.folder.exists():
            if not (self.folder / RUN_FILE).is_file():
                raise InputError(f"{self.folder} has no {RUN_FILE} and is not replaced: choose another --output")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._write_facts(facts)

    def save(self, suite: str, results: Recorder, facts: Facts) -> None:
        """Write what a finished suite measured."""
        write_object(self.folder / f"{suite}.json", measured_json(results.measurements, results.failures))
        self._write_facts(facts)

    def resume(self, facts: Facts, recorder: Recorder) -> tuple[Facts, frozenset[str]]:
        """Put the finished suites into a recorder, after a check that this run is the same one.

        Returns:
            The facts of the interrupted run, and the names of its finished suites.

        Raises:
            InputError: nothing was interrupted, or it was measured with something else; the message names it.
        """
        file = self.folder / RUN_FILE
        if not file.is_file():
            raise InputError(f"--resume: {file} does not exist: leave the option out to start anew")
        before = read_facts(read_object(file), file)
        then_and_now: Mapping[str, tuple[object, object]] = {
            "bundle's fingerprint": (before.subject.fingerprint, facts.subject.fingerprint),
            "workload": (before.workload.texts_sha256, facts.workload.texts_sha256),
            "settings": (before.settings, facts.settings),
            "machine": (before.host.identity, facts.host.identity),
            "versions": (dict(before.versions), dict(facts.versions)),
            "commit": (before.source.commit, facts.source.commit),
        }
        for what, (then, now) in then_and_now.items():
            if then != now:
                raise InputError(f"--resume: the {what} of the interrupted run was {then}, now it is {now}: start anew")
        finished = set()
        for path in sorted(self.folder.glob("*.json")):
            if path.name != RUN_FILE:
                measured = read_measured(read_object(path), path)
                for measurement in measured["measurements"]:
                    recorder.add(measurement)
                recorder.failures += measured["failures"]
                finished.add(path.stem)
        return replace(before, resumed=(*before.resumed, facts.started)), frozenset(finished)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def _write_facts(self, facts: Facts) -> None:
        write_object(self.folder / RUN_FILE, {"schema_version": SCHEMA_VERSION, "facts": to_json(facts)})
