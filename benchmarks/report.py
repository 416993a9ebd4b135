"""Results to a report folder: report.json, report.md, report.html and plots, whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine_results import Host
from benchmarks.markdown import render_markdown
from benchmarks.plots import draw_plots
from benchmarks.results import REPORT_FILE, SCHEMA_VERSION, Report, Settings, Source, Subject
from benchmarks.session import Plan, Results
from benchmarks.summary import median
from benchmarks.webpage import render_webpage
from mirror_runtime.bundle import Layout, Manifest, to_json
from mirror_runtime.errors import InputError
from mirror_runtime.folders import whole_folder

MARKDOWN_FILE = "report.md"
PAGE_FILE = "report.html"


def check_output(folder: Path) -> None:
    """Refuse, before anything is measured, a folder that holds something other than a report.

    Raises:
        InputError: it does, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file: choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT_FILE).is_file():
        raise InputError(f"--output {folder} is not empty and holds no report to replace: choose another folder")


def build_report(
    plan: Plan,
    results: Results,
    *,
    host: Host,
    versions: Mapping[str, str],
    source: Source,
    started: str,
    resumed: tuple[str, ...],
    wall_s: float,
    partial: bool,
) -> Report:
    """Put the results so far into a report."""
    spec = plan.manifest.encoder
    return Report(
        schema_version=SCHEMA_VERSION,
        partial=partial,
        started=started,
        resumed=resumed,
        finished=tuple(results.finished),
        wall_s=wall_s,
        host=host,
        versions=versions,
        source=source,
        subject=Subject(
            name=plan.bundle.resolve().name,
            fingerprint=plan.manifest.fingerprint,
            base_model=spec.base_model,
            max_tokens=spec.max_tokens,
            dim=spec.dim,
            artifacts=packed_artifacts(plan.manifest),
            flop_per_token=plan.flop_per_token,
        ),
        workload=plan.workload.info,
        settings=settings_of(plan),
        ceilings=tuple(results.ceilings.values()),
        bandwidth=results.bandwidth,
        latency=tuple(sorted(results.latency.values(), key=lambda r: r.point.name)),
        throughput=tuple(results.throughput.values()),
        lengths=tuple(sorted(results.lengths.values(), key=lambda r: r.point.name)),
        startup=tuple(results.startup.values()),
        quality_sets=results.quality_sets,
        quality=tuple(results.quality.values()),
        serving=tuple(results.serving.values()),
        ours_beside_peers=tuple(results.ours_beside_peers.values()),
        peers=tuple(results.peers.values()),
        single_texts=tuple(results.single_texts.values()),
        comparisons=tuple(results.comparisons.values()),
        training=tuple(results.training.values()),
        scaling=tuple(results.scaling.values()),
        failures=tuple(results.failures),
    )


def settings_of(plan: Plan) -> Settings:
    """Give what a report says was asked for."""
    return Settings(
        suites=plan.suites,
        points=tuple(point.name for point in plan.points),
        peers=plan.peers,
        sets_sha256=tuple(one.sha256 for one in plan.sets),
        training=plan.training,
        quick=plan.quick,
        rounds=plan.rounds,
        seed=plan.seed,
        planted_slowdown=plan.planted_slowdown,
    )


def packed_artifacts(manifest: Manifest) -> tuple[str, ...]:
    """Name the engine and precision of every packed artifact."""
    packed = [artifact for artifact in manifest.artifacts if artifact.layout is Layout.PACKED]
    return tuple(f"{artifact.engine.value} {artifact.precision.value}" for artifact in packed)


def write_report(report: Report, folder: Path) -> None:
    """Write the report's files; a report that was there is replaced when the new one is complete.

    Raises:
        InputError: the folder cannot be written.
    """
    check_output(folder)
    with whole_folder(folder, overwrite=True, marker=REPORT_FILE) as partial:
        plots = draw_plots(report, partial)
        (partial / MARKDOWN_FILE).write_text(render_markdown(report, plots), encoding="utf-8")
        (partial / PAGE_FILE).write_text(render_webpage(report), encoding="utf-8")
        (partial / REPORT_FILE).write_text(_compact_json(report), encoding="utf-8")


_NUMBERS = re.compile(r"\[\s+((?:[-+.\deE]+,\s+)*[-+.\deE]+)\s+\]")


def _compact_json(report: Report) -> str:
    """Give indented JSON with each list of numbers on a line: samples come in thousands, and reports are committed."""
    text = json.dumps(to_json(report), indent=2, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def headline(report: Report, folder: Path) -> dict[str, Any]:
    """Give the report's figures without samples, for the one JSON line that ends standard output."""
    return {
        "report": str(folder / REPORT_FILE),
        "schema_version": report.schema_version,
        "partial": report.partial,
        "fingerprint": report.subject.fingerprint,
        "cpu": report.host.cpu_model,
        "cores_usable": report.host.cores_usable,
        "ceilings": [
            {"engine": c.engine.value, "precision": c.precision.value, "gflop_per_s": c.gflop_per_s}
            for c in report.ceilings
        ],
        "memory": None
        if report.bandwidth is None
        else {"read_gb_per_s": report.bandwidth.read_gb_per_s, "copy_gb_per_s": report.bandwidth.copy_gb_per_s},
        "latency": [
            {"point": r.point.name, "tokens": r.tokens, "p50_ms": r.p50_ms, "p99_ms": r.p99_ms} for r in report.latency
        ],
        "single_texts": [
            {"party": r.party, "tokens": r.tokens, "p50_ms": r.p50_ms, "p99_ms": r.p99_ms} for r in report.single_texts
        ],
        "throughput": [
            {
                "point": r.point.name,
                "texts_per_s": r.texts_per_s,
                "tokens_per_s": r.tokens_per_s,
                "ceiling_share": r.ceiling_share,
                "row_fill": r.row_fill,
                "min_cosine": r.point.parity.min_cosine,
            }
            for r in report.throughput
        ],
        "lengths": [
            {"point": r.point.name, "tokens": r.tokens, "tokens_per_s": r.tokens_per_s} for r in report.lengths
        ],
        "startup": [
            {
                "party": r.party,
                "median_s": r.median_s,
                "first_vector_bytes": r.first_vector_bytes,
                "peak_bytes": r.peak_bytes,
                "installed_bytes": r.installed_bytes,
            }
            for r in report.startup
        ],
        "quality": [
            {
                "party": r.party,
                "mean_spearman": r.mean.value,
                "delta": None if r.mean_delta is None else r.mean_delta.value,
                "top10_overlap": r.top10_overlap,
            }
            for r in report.quality
        ],
        "serving": [
            {
                "point": r.name,
                "best_texts_per_s": max((loop.texts_per_s for loop in r.closed), default=None),
                "share_of_in_process": r.share_of_in_process,
                "knee_per_s": r.knee_per_s,
                "overload_goodput_share": None if r.overload is None else r.overload.goodput_share,
            }
            for r in report.serving
        ],
        "comparisons": [
            {"ours": c.point.name, "peer": c.peer, "ratio": c.ratio, "min_cosine": c.min_cosine}
            for c in report.comparisons
        ],
        "training": [
            {"party": r.party, "median_s": r.median_s, "mean_spearman": median([run.mean for run in r.runs])}
            for r in report.training
        ],
        "scaling": [
            {
                "point": r.point.name,
                "us_per_text": {str(size.texts): size.us_per_text for size in r.sizes},
                "peak_bytes": {str(size.texts): size.peak_bytes for size in r.sizes},
                "texts_per_s": {str(one.cores): one.texts_per_s for one in r.cores},
                "callers_share": None if r.callers is None else r.callers.share,
            }
            for r in report.scaling
        ],
        "failures": len(report.failures),
    }
