"""Interrupted runs continue where they stopped: the finished suites are a report beside the report's folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from benchmarks.report.facts import Facts
from benchmarks.report.storage import REPORT_FILE, Report, read_report, write_report
from mirror_runtime.errors import InputError

MUST_AGREE = {
    "bundle's fingerprint": attrgetter("subject.fingerprint"),
    "workload": attrgetter("workload.texts_sha256"),
    "settings": attrgetter("settings"),
    "machine": attrgetter(
        "host.cpu_model", "host.cores_online", "host.cores_usable", "host.memory_bytes", "host.python"
    ),
    "versions": attrgetter("versions"),
    "commit": attrgetter("source.commit"),
}
"""What must be equal for an interrupted run to continue."""


class Unfinished:
    """What a run has finished, in a folder beside its report's `output` that is deleted when the run is complete."""

    def __init__(self, output: Path) -> None:
        self.folder = output.absolute().with_name(f"{output.absolute().name}.unfinished")

    def start(self, facts: Facts) -> Report:
        """Begin a new run; what an interrupted one left is deleted.

        Raises:
            InputError: the folder has something else.
        """
        if self.folder.exists():
            if not (self.folder / REPORT_FILE).is_file():
                raise InputError(f"{self.folder} has no {REPORT_FILE} and is not replaced: choose another --output")
            self.remove()
        self.folder.mkdir(parents=True)
        empty = Report(facts=facts, measurements=(), failures=())
        self.save(empty)
        return empty

    def save(self, report: Report) -> None:
        """Write what finished suites measured, whole or not at all."""
        partial = self.folder / f"{REPORT_FILE}.partial"
        write_report(report, partial)
        partial.replace(self.folder / REPORT_FILE)

    def resume(self, facts: Facts) -> Report:
        """Return what the interrupted run finished, after a check that this run is the same one.

        Raises:
            InputError: nothing was interrupted, or it was measured with something else; the message names it.
        """
        if not (self.folder / REPORT_FILE).is_file():
            raise InputError(f"--resume: {self.folder} has no {REPORT_FILE}: leave the option out to start anew")
        report = read_report(self.folder)
        for what, of in MUST_AGREE.items():
            if (then := of(report.facts)) != (now := of(facts)):
                raise InputError(f"--resume: the {what} of the interrupted run was {then}, now it is {now}: start anew")
        return replace(report, facts=replace(report.facts, resumed=(*report.facts.resumed, facts.started)))

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)
