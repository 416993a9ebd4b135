"""An interrupted run goes on where it stopped: its partial report holds what need not be measured again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.machine_results import Host
from benchmarks.report import settings_of
from benchmarks.results import Failure, Report, Source, read_report
from benchmarks.session import Plan, Results
from mirror_runtime.errors import InputError


def read_interrupted(folder: Path, plan: Plan, *, host: Host, versions: Mapping[str, str], source: Source) -> Report:
    """Read the partial report in a folder, and see that this run is the same one.

    Raises:
        InputError: there is none, it is complete, or it was measured with something else; the message says with what.
    """
    try:
        report = read_report(folder)
    except InputError as error:
        raise InputError(f"--resume: {error}") from error
    if not report.partial:
        raise InputError(f"--resume: the report in {folder} is complete: leave the option out to measure anew")
    then_and_now: Mapping[str, tuple[object, object]] = {
        "bundle's fingerprint": (report.subject.fingerprint, plan.manifest.fingerprint),
        "workload": (report.workload.texts_sha256, plan.workload.info.texts_sha256),
        "settings": (report.settings, settings_of(plan)),
        "machine": (_machine(report.host), _machine(host)),
        "versions": (dict(report.versions), dict(versions)),
        "commit": (report.source.commit, source.commit),
    }
    for what, (then, now) in then_and_now.items():
        if then != now:
            raise InputError(f"--resume: the {what} of the interrupted run was {then}, and is {now}: measure anew")
    return report


def restore(report: Report) -> Results:
    """Give the results of an interrupted run that are complete; what was half done is measured anew."""
    done = set(report.finished)
    peers = "peers" in done
    return Results(
        ceilings={(c.engine, c.precision): c for c in report.ceilings if "ceilings" in done},
        bandwidth=report.bandwidth if "ceilings" in done else None,
        latency={(r.point.name, r.tokens): r for r in report.latency if f"latency {r.tokens}" in done},
        throughput={r.point.name: r for r in report.throughput if "throughput" in done},
        lengths={(r.point.name, r.tokens): r for r in report.lengths if "lengths" in done},
        startup={r.party: r for r in report.startup if "startup" in done},
        quality={r.party: r for r in report.quality if not r.ours and peers},
        serving={r.name: r for r in report.serving if f"serving {r.name}" in done},
        ours_beside_peers={r.point.name: r for r in report.ours_beside_peers if peers},
        peers={r.name: r for r in report.peers if peers},
        single_texts={r.party: r for r in report.single_texts if peers},
        comparisons={(c.point.name, c.peer): c for c in report.comparisons if peers},
        training={r.party: r for r in report.training},
        scaling={r.point.name: r for r in report.scaling},
        failures=[failure for failure in report.failures if _kept(failure, done)],
        finished=list(report.finished),
    )


def _kept(failure: Failure, done: set[str]) -> bool:
    if failure.suite == "quality":
        return False  # vectors are judged anew: peers' need the baseline
    return failure.suite in done or f"{failure.suite} {failure.party}" in done


def _machine(host: Host) -> tuple[object, ...]:
    return host.cpu_model, host.cores_online, host.cores_usable, host.memory_bytes, host.python
