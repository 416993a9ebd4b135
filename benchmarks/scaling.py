"""Suite `scaling`: cost against texts, cores and callers, every figure from a fresh process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.point import Point
from benchmarks.scaling_results import CallersResult, CoresResult, FullQueue, ScalingResult, SizeResult
from benchmarks.session import Plan, Results, steps
from benchmarks.summary import median, thin
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores
from mirror_runtime.selection import AUTO, choose

SIZES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_SIZES = (1_000, 4_000, 16_000)
LONG = 10_000
"""Sizes above it are measured once: they last long enough to be their own average. A quick run measures all once."""

CALLERS = 100

SCRIPT = Path(__file__).resolve().parent / "scaling_process.py"
_LIMITED = (
    "import json, os, sys; os.sched_setaffinity(0, json.loads(sys.argv[1])); os.execv(sys.executable, sys.argv[2:])"
)
"""Cores are taken away before the program starts, so that no library has counted them yet."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One step of a point: its name, and what it adds to the point's result."""

    name: str
    measure: Callable[[ScalingResult], ScalingResult]


def run_scaling(plan: Plan, results: Results, progress: Progress) -> None:
    """Measure every point, or with `quick` the one that "auto" means; each figure is a step of its own."""
    if results.has("scaling"):
        return
    points = _points(plan, results)
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        texts = Path(folder) / "texts.json"
        texts.write_text(json.dumps(plan.workload.texts), encoding="utf-8")
        work = [(point, part) for point in points for part in _parts(plan, point, texts)]
        with steps(progress, "scaling", len(work)) as done:
            for point, part in work:
                party = f"{point.name}, {part.name}"
                if not results.has(f"scaling {party}"):
                    before = results.scaling.get(
                        point.name, ScalingResult(point=point, sizes=(), cores=(), callers=None)
                    )
                    try:
                        results.scaling[point.name] = part.measure(before)
                    except EngineError as error:
                        results.fail("scaling", party, error)
                    results.finish(f"scaling {party}")
                done(party)
    results.finish("scaling")


def cores_to_try(cores: int) -> list[int]:
    """Give 1, 2, 4 and so on, and all."""
    return [*(2**power for power in range(cores.bit_length()) if 2**power < cores), cores]


def _points(plan: Plan, results: Results) -> Sequence[Point]:
    if not plan.quick or len(plan.points) < 2:
        return plan.points
    engine, precision, _ = choose(plan.manifest, AUTO, AUTO)
    chosen = [point for point in plan.points if (point.engine, point.precision) == (engine, precision)]
    chosen = chosen or [plan.points[0]]
    for point in plan.points:
        if point is not chosen[0]:
            results.fail("scaling", point.name, f"a quick run scales one artifact, {chosen[0].name}")
    return chosen


def _parts(plan: Plan, point: Point, texts: Path) -> list[Part]:
    task = {
        "bundle": str(plan.bundle.resolve()),
        "engine": point.engine.value,
        "precision": point.precision.value,
        "texts": str(texts),
        "rounds": plan.rounds,
    }
    count = len(plan.workload.texts)

    def size(texts: int) -> Part:
        repetitions = plan.rounds if texts <= LONG and not plan.quick else 1

        def measure(before: ScalingResult) -> ScalingResult:
            said = [_ask({**task, "what": "size", "count": texts}) for _ in range(repetitions)]
            return replace(before, sizes=(*before.sizes, _size(texts, said)))

        return Part(name=f"{texts:,} texts", measure=measure)

    def cores(cores: int) -> Part:
        def measure(before: ScalingResult) -> ScalingResult:
            said = _ask({**task, "what": "cores"}, cores=cores)
            return replace(before, cores=(*before.cores, _cores(cores, count, said)))

        return Part(name=f"{cores} cores", measure=measure)

    def callers(before: ScalingResult) -> ScalingResult:
        return replace(before, callers=_callers(count, _ask({**task, "what": "callers", "count": CALLERS})))

    return [
        *map(size, QUICK_SIZES if plan.quick else SIZES),
        *map(cores, cores_to_try(usable_cores()) if hasattr(os, "sched_setaffinity") else ()),
        Part(name=f"{CALLERS} callers", measure=callers),
    ]


def _ask(task: Mapping[str, Any], cores: int | None = None) -> Any:
    """Run one task in a fresh process, on the first so many of this process's cores.

    Raises:
        EngineError: it failed; the message is its last line.
    """
    command = [sys.executable, str(SCRIPT), json.dumps(task)]
    if cores is not None:
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        command = [sys.executable, "-c", _LIMITED, json.dumps(allowed), *command]
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as neutral:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=neutral, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EngineError(f"its process ended with status {done.returncode}: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def _size(texts: int, said: Sequence[Mapping[str, Any]]) -> SizeResult:
    seconds = tuple(float(one["seconds"]) for one in said)
    return SizeResult(
        texts=texts,
        tokens=int(said[0]["tokens"]),
        samples_s=seconds,
        us_per_text=1e6 * median(seconds) / texts,
        first_bytes=round(median([one["first_bytes"] for one in said])),
        peak_bytes=round(median([one["peak_bytes"] for one in said])),
    )


def _cores(cores: int, texts: int, said: Mapping[str, Any]) -> CoresResult:
    wall, processor = tuple(said["samples_s"]), tuple(said["cpu_s"])
    return CoresResult(
        cores=cores,
        streams=said["streams"],
        texts=texts,
        samples_s=wall,
        cpu_s=processor,
        texts_per_s=texts / median(wall),
        cpu_share=max(used / seconds for used, seconds in zip(processor, wall, strict=True)),
    )


def _callers(texts: int, said: Mapping[str, Any]) -> CallersResult:
    queue = said["queue"]
    refused = queue["refused_ms"]
    return CallersResult(
        callers=CALLERS,
        texts=texts,
        offline_samples_s=tuple(said["offline_s"]),
        callers_samples_s=tuple(said["callers_s"]),
        share=median(said["offline_s"]) / median(said["callers_s"]),
        queue=FullQueue(
            max_waiting=queue["max_waiting"],
            sent=queue["sent"],
            accepted=queue["sent"] - len(refused),
            answered=queue["answered"],
            min_cosine=queue["min_cosine"],
            refused_samples_ms=thin(refused) if refused else (),
            refused_p50_ms=median(refused) if refused else None,
            refused_max_ms=max(refused) if refused else None,
        ),
    )
