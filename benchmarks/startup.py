"""Suite `startup`: seconds from process start to the first vector, each time in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from benchmarks.point import Point
from benchmarks.results import StartupResult
from benchmarks.session import Plan, Results, steps
from benchmarks.summary import interleave, median
from mirror_runtime.errors import EngineError

FEWEST_ROUNDS = 5
QUICK_ROUNDS = 2
READY = "ready"

_OURS = f"""
import sys
from mirror_runtime import Encoder
encoder = Encoder.load(sys.argv[1], engine=sys.argv[2], precision=sys.argv[3])
assert encoder.encode(["How long does the first vector take?"]).shape == (1, encoder.spec.dim)
sys.stdout.write("{READY}\\n")
sys.stdout.flush()
"""


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A command that prints `ready` on a line of its own once it holds a vector.

    Attributes:
        party: its name in the report.
        min_cosine: of the artifact's export; None for a peer.
        environment: the process's whole environment, or None for this one's.
    """

    party: str
    min_cosine: float | None
    command: tuple[str, ...]
    environment: Mapping[str, str] | None = None


def our_starters(plan: Plan, points: Sequence[Point]) -> list[Starter]:
    """Give the commands of our runtime, one for each point."""
    return [
        Starter(
            party=f"mirror_runtime {point.name}",
            min_cosine=point.parity.min_cosine,
            command=(
                *(sys.executable, "-c", _OURS),
                *(str(plan.bundle.resolve()), point.engine.value, point.precision.value),
            ),
        )
        for point in points
    ]


def run_startup(plan: Plan, starters: Sequence[Starter], results: Results, progress: Progress) -> None:
    """Start every party once untimed, so that files are in the page cache, then let them take turns."""
    if results.has("startup"):
        return
    rounds = QUICK_ROUNDS if plan.quick else max(FEWEST_ROUNDS, plan.rounds)
    samples: dict[str, list[float]] = {starter.party: [] for starter in starters}
    failed: set[str] = set()
    with steps(progress, "startup", len(starters) * (rounds + 1)) as done:
        for round_, starter in interleave(starters, rounds + 1):
            if starter.party not in failed:
                try:
                    seconds = time_to_ready(starter)
                except EngineError as error:
                    failed.add(starter.party)
                    results.fail("startup", starter.party, error)
                else:
                    if round_ > 0:
                        taken = samples[starter.party]
                        taken.append(seconds)
                        results.startup[starter.party] = StartupResult(
                            party=starter.party,
                            min_cosine=starter.min_cosine,
                            samples_s=tuple(taken),
                            median_s=median(taken),
                        )
            done(starter.party)
    results.finish("startup")


def time_to_ready(starter: Starter) -> float:
    """Start the process and give the seconds until it says `ready`; then wait for its end.

    Raises:
        EngineError: it ended without a vector.
    """
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as neutral:
        errors = Path(neutral) / "stderr"
        with errors.open("wb") as sink:
            began = time.perf_counter()
            process = subprocess.Popen(
                starter.command,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                cwd=neutral,
                env=None if starter.environment is None else dict(starter.environment),
            )
            with process:
                assert process.stdout is not None  # stdout=PIPE
                ready = next((True for line in process.stdout if line.strip() == READY), False)
                seconds = time.perf_counter() - began
                process.stdout.read()
        if not ready:
            last = errors.read_text(errors="replace").strip().splitlines()[-1:]
            raise EngineError(f"ended with status {process.returncode} before its first vector: {' '.join(last)}")
    return seconds
