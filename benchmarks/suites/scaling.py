"""Suite `scaling`: cost against texts, cores and callers, every figure from a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.plan import Plan, Suite, Variant, auto_variants, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from benchmarks.report.statistics import median
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores

SUITE = Suite.SCALING.value

SIZES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_SIZES = (1_000, 4_000, 16_000)
LONG = 10_000
"""Sizes above it are measured once: they run long enough to average out. A quick run measures all sizes once."""

CALLERS = 100

SCRIPT = Path(__file__).resolve().parent / "scaling_process.py"


def run_scaling(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Measure every variant, or in a quick run the one that "auto" selects."""
    variants = auto_variants(plan, Suite.SCALING, plan.variants, recorder)
    texts = plan.scratch / "scaling.json"
    texts.write_text(json.dumps(plan.workload.texts), encoding="utf-8")
    work = [(variant, *step) for variant in variants for step in _steps(plan, variant, texts.resolve())]
    with steps(progress, SUITE, len(work)) as done:
        for variant, name, measure in work:
            party = f"{variant.name}, {name}"
            with recorder.failing(SUITE, party):
                measure(recorder)
            done(party)


def cores_to_try(cores: int) -> list[int]:
    """Return 1, 2, 4 and so on, and all."""
    return [*(2**power for power in range(cores.bit_length()) if 2**power < cores), cores]


def _steps(plan: Plan, variant: Variant, texts: Path) -> list[tuple[str, Callable[[Recorder], None]]]:
    """Return the figures of a variant: the name of each, and the function that measures and records it."""
    task = {
        "bundle": str(plan.bundle.resolve()),
        "engine": variant.engine.value,
        "precision": variant.precision.value,
        "texts": str(texts),
        "rounds": plan.rounds,
    }
    name, count = variant.name, len(plan.workload.texts)
    found: list[tuple[str, Callable[[Recorder], None]]] = []
    for size in QUICK_SIZES if plan.quick else SIZES:
        processes = plan.rounds if size <= LONG and not plan.quick else 1
        found.append((f"{size:,} texts", partial(_size, name, task, size, processes)))
    for cores in cores_to_try(usable_cores()) if hasattr(os, "sched_setaffinity") else []:
        found.append((f"{cores} cores", partial(_cores, name, task, cores, count)))
    return [*found, (f"{CALLERS} callers", partial(_callers, name, task, count))]


def run_to_end(command: Sequence[str], name: str) -> str:
    """Run a command in an empty folder and return its standard output.

    Raises:
        EngineError: it failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as neutral:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=neutral, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EngineError(f"{name} ended with status {done.returncode}: {last[0]}")
    return done.stdout


def _run(task: Mapping[str, Any], **more: Any) -> Any:
    """Run one task in a fresh process."""
    out = run_to_end([sys.executable, str(SCRIPT), json.dumps({**task, **more})], "its process")
    return json.loads(out.splitlines()[-1])


def _size(party: str, task: Mapping[str, Any], texts: int, processes: int, recorder: Recorder) -> None:
    """Record the time per text and the memory of so many different texts through `encode_stream`."""
    runs = [_run(task, what="size", count=texts) for _ in range(processes)]
    fact = partial(recorder.record, SUITE, party, conditions={"texts": texts})
    fact("time per text", *(1e6 * run["seconds"] / texts for run in runs), unit="us", better=Better.LOWER)
    fact("tokens per text", runs[0]["tokens"] / texts)
    fact("memory at the first window", *(run["first_bytes"] for run in runs), unit="B")
    fact("peak memory", *(run["peak_bytes"] for run in runs), unit="B")


def _cores(party: str, task: Mapping[str, Any], cores: int, texts: int, recorder: Recorder) -> None:
    """Record passes over the workload in a process that may run on the first so many cores."""
    with _affinity(cores):
        run = _run(task, what="cores")
    fact = partial(recorder.record, SUITE, party, conditions={"cores": cores})
    fact("time per text", *(1e6 * seconds / texts for seconds in run["samples_s"]), unit="us", better=Better.LOWER)
    fact("texts per second", *(texts / seconds for seconds in run["samples_s"]), unit="1/s")
    fact("streams", run["streams"])
    used = [cpu / wall for cpu, wall in zip(run["cpu_s"], run["samples_s"], strict=True)]
    fact("CPU seconds per second", *used)


def _callers(party: str, task: Mapping[str, Any], texts: int, recorder: Recorder) -> None:
    """Record concurrent callers of single texts beside one `encode`, and callers that meet a full queue."""
    run = _run(task, what="callers", count=CALLERS)
    fact = partial(recorder.record, SUITE, party, conditions={"callers": CALLERS})
    fact("time per text", *(1e6 * seconds / texts for seconds in run["callers_s"]), unit="us", better=Better.LOWER)
    fact("texts per second", *(texts / seconds for seconds in run["callers_s"]), unit="1/s")
    fact("texts per second of one encode", *(texts / seconds for seconds in run["offline_s"]), unit="1/s")
    fact("share of one encode", median(run["offline_s"]) / median(run["callers_s"]))
    queue = run["queue"]
    refused = queue["refused_ms"]
    fact = partial(recorder.record, SUITE, party, conditions={"full queue": queue["max_waiting"]})
    fact("calls", queue["sent"])
    fact("accepted", queue["sent"] - len(refused))
    fact("answered", queue["answered"])
    fact("worst cosine to one encode", queue["min_cosine"])
    if refused:
        fact("time until refused", *refused, unit="ms")


@contextmanager
def _affinity(cores: int) -> Iterator[None]:
    """Leave this thread, and processes that it starts, the first so many of its cores.

    They are taken away before the process starts, so that no library of it counts them.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
