"""Suite `startup`: seconds from process start to the first vector, each time in a fresh process, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.progress import Progress

from benchmarks.peers.footprint import our_bytes
from benchmarks.plan import Plan, Suite, steps, take_turns
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from mirror_runtime.errors import EngineError

SUITE = Suite.STARTUP.value
FEWEST_ROUNDS = 5
QUICK_ROUNDS = 1
MOST_TEXTS = 1000
QUICK_MOST_TEXTS = 100

LONGEST_S = 180.0
"""Limit of one start: a party that reports nothing more by then is killed."""

END_S = 3.0
"""Grace period for a process whose work is done."""

READY, DONE = "ready", "done"

SCRIPT = Path(__file__).resolve().parent / "startup_process.py"


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A command that prints `ready` and its peak memory once it has a vector, and `done` and that after a file's texts.

    Attributes:
        party: its name in the report.
        command: without the file's name, which is appended.
        installed_bytes: size of the packages that it needs.
        environment: the process's whole environment, or None for this one's.
    """

    party: str
    command: tuple[str, ...]
    installed_bytes: int
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start: seconds to the first vector, peak memory then, and after the texts."""

    seconds: float
    first_vector_bytes: int
    peak_bytes: int


def our_starters(plan: Plan) -> list[Starter]:
    """Return the commands of our runtime, one for each variant."""
    return [
        Starter(
            party=variant.name,
            command=(
                *(sys.executable, str(SCRIPT)),
                *(str(plan.bundle.resolve()), variant.engine.value, variant.precision.value),
            ),
            installed_bytes=our_bytes(variant.engine),
        )
        for variant in plan.variants
    ]


def run_startup(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Start every party once untimed, so that files are in the page cache, then interleave timed starts."""
    starters = [*our_starters(plan), *plan.peer_starters]
    rounds = QUICK_ROUNDS if plan.quick else max(FEWEST_ROUNDS, plan.rounds)
    texts = plan.workload.texts[: QUICK_MOST_TEXTS if plan.quick else MOST_TEXTS]
    file = plan.scratch / "startup.json"
    file.write_text(json.dumps(texts), encoding="utf-8")

    def turns(starter: Starter) -> Callable[[int], None]:
        starts: list[Start] = []

        def turn(round_: int) -> None:
            start = run_start(starter, file)
            if round_ > 0:
                starts.append(start)
                _record(starter, starts, len(texts), recorder)

        return turn

    with steps(progress, SUITE, len(starters) * (rounds + 1)) as done:
        parties = {starter.party: turns(starter) for starter in starters}
        take_turns(parties, rounds + 1, lambda name, error: recorder.fail(SUITE, name, error), done)


def run_start(starter: Starter, texts: Path) -> Start:
    """Start the process, time it until it prints `ready`, let it encode the texts, and end it.

    Raises:
        EngineError: it ended, or was killed after `LONGEST_S`, before its first vector or before those of the texts.
    """
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as neutral:
        errors = Path(neutral) / "stderr"
        peaks: dict[str, int] = {}
        seconds = 0.0
        with errors.open("wb") as sink:
            began = time.perf_counter()
            process = subprocess.Popen(
                (*starter.command, str(texts.resolve())),
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                cwd=neutral,
                env=None if starter.environment is None else dict(starter.environment),
            )
            too_long = threading.Timer(LONGEST_S, process.kill)
            too_long.daemon = True
            too_long.start()
            with process:
                assert process.stdout is not None  # stdout=PIPE
                for line in process.stdout:
                    word, _, peak = line.strip().partition(" ")
                    if word in (READY, DONE):
                        peaks[word] = int(peak)
                        seconds = seconds or time.perf_counter() - began
                    if word == DONE:
                        _let_end(process)
                        break
            too_long.cancel()
        if READY not in peaks or DONE not in peaks:
            last = errors.read_text(errors="replace").strip().splitlines()[-1:]
            missing = "its first vector" if READY not in peaks else "the vectors of the texts"
            raise EngineError(f"ended with status {process.returncode} before {missing}: {' '.join(last)}")
    return Start(seconds=seconds, first_vector_bytes=peaks[READY], peak_bytes=peaks[DONE])


def _let_end(process: subprocess.Popen[str]) -> None:
    """Wait for a process whose work is done, and kill it where threads of its library keep it alive."""
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _record(starter: Starter, starts: Sequence[Start], texts: int, recorder: Recorder) -> None:
    fact = partial(recorder.record, SUITE, starter.party)
    fact("time to the first vector", *(start.seconds for start in starts), unit="s", better=Better.LOWER)
    fact("memory at the first vector", *(start.first_vector_bytes for start in starts), unit="B")
    fact("peak memory", *(start.peak_bytes for start in starts), unit="B")
    fact("texts for the peak", texts)
    fact("installed packages", starter.installed_bytes, unit="B")
