"""Suite `scaling`: cost against texts, cores and callers, every figure from a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.plan import Plan, Suite, auto_variants, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores

SUITE = Suite.SCALING.value

SIZES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_SIZES = (1_000, 4_000, 16_000)
LONG = 10_000
"""Sizes above it are measured once: they run long enough to average out. A quick run measures all sizes once."""

CALLERS = 100

SCRIPT = Path(__file__).resolve().parent / "scaling_process.py"

QUEUE = 5 * CALLERS
"""Texts that fill the queue which callers meet."""

UNITS = {
    "time per text": "us",
    "time until refused": "ms",
    "texts per second": "1/s",
    "texts per second of one encode": "1/s",
    "memory at the first window": "B",
    "peak memory": "B",
}


def run_scaling(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Measure every variant, or in a quick run the one that "auto" selects."""
    variants = auto_variants(plan, Suite.SCALING, plan.variants, recorder)
    file = plan.scratch.resolve() / "scaling.json"
    file.write_text(json.dumps(plan.workload.texts), encoding="utf-8")
    sizes = QUICK_SIZES if plan.quick else SIZES
    # A condition, its value, and in how many processes it is measured.
    work = [("texts", size, 1 if plan.quick or size > LONG else plan.rounds) for size in sizes]
    if shutil.which("taskset"):
        work += [("cores", cores, 1) for cores in cores_to_try(usable_cores())]
    work += [("callers", CALLERS, 1), ("full queue", QUEUE, 1)]
    with steps(progress, SUITE, len(variants) * len(work)) as done:
        for variant in variants:
            for what, count, processes in work:
                task = {
                    "bundle": str(plan.bundle.resolve()), "engine": variant.engine.value,
                    "precision": variant.precision.value, "texts": str(file), "rounds": plan.rounds, "what": what,
                    "count": count,
                }  # fmt: skip
                with recorder.failing(SUITE, f"{variant.name}, {what} {count:,}"):
                    runs = [_run(task) for _ in range(processes)]
                    for metric in runs[0]:
                        recorder.record(
                            SUITE, variant.name, metric, *(sample for run in runs for sample in run[metric]),
                            unit=UNITS.get(metric, ""), conditions={what: count},
                            better=Better.LOWER if metric == "time per text" else Better.NEITHER,
                        )  # fmt: skip
                done(f"{variant.name}, {what} {count:,}")


def cores_to_try(cores: int) -> list[int]:
    """Return 1, 2, 4 and so on, and all."""
    return [*(2**power for power in range(cores.bit_length()) if 2**power < cores), cores]


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


def _run(task: Mapping[str, Any]) -> Any:
    """Run one task in a fresh process, which may use only the first so many of our cores if the task is about cores.

    They are taken away before Python starts, so that no library counts them.
    """
    command = [sys.executable, str(SCRIPT), json.dumps(task)]
    if task["what"] == "cores":
        allowed = sorted(os.sched_getaffinity(0))[: task["count"]]
        command = ["taskset", "-c", ",".join(map(str, allowed)), *command]
    return json.loads(run_to_end(command, "its process").splitlines()[-1])
