"""Suite `startup`: seconds from process start to the first vector, each time in a fresh process, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from benchmarks.footprint import our_bytes
from benchmarks.results import StartupResult
from benchmarks.session import Plan, Results, steps
from benchmarks.summary import interleave, median
from mirror_runtime.errors import EngineError

FEWEST_ROUNDS = 5
QUICK_ROUNDS = 1
MOST_TEXTS = 1000
QUICK_MOST_TEXTS = 100

LONGEST_S = 180.0
"""Of one start: a party that has said nothing more by then is ended."""

END_S = 3.0
"""For a process to end when its work is done."""

READY, DONE = "ready", "done"

_OURS = f"""
import json, sys
from mirror_runtime import Encoder
def say(word):
    with open("/proc/self/status", encoding="ascii") as status:
        peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    print(word, peak, flush=True)
encoder = Encoder.load(sys.argv[1], engine=sys.argv[2], precision=sys.argv[3])
assert encoder.encode(["How long does the first vector take?"]).shape == (1, encoder.spec.dim)
say("{READY}")
with open(sys.argv[4], encoding="utf-8") as texts:
    encoder.encode(json.load(texts))
say("{DONE}")
"""


@dataclass(frozen=True, kw_only=True)
class Starter:
    """A command that says `ready` and its peak memory once it holds a vector, and `done` and that after a file's texts.

    Attributes:
        party: its name in the report.
        min_cosine: of the artifact's export; None for a peer.
        command: the file's name is its last argument, and is not in here.
        installed_bytes: of the packages that it needs.
        environment: the process's whole environment, or None for this one's.
    """

    party: str
    min_cosine: float | None
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
    """Give the commands of our runtime, one for each point."""
    return [
        Starter(
            party=f"mirror_runtime {point.name}",
            min_cosine=point.parity.min_cosine,
            command=(
                *(sys.executable, "-c", _OURS),
                *(str(plan.bundle.resolve()), point.engine.value, point.precision.value),
            ),
            installed_bytes=our_bytes(point.engine),
        )
        for point in plan.points
    ]


def run_startup(plan: Plan, starters: Sequence[Starter], results: Results, progress: Progress) -> None:
    """Start every party once untimed, so that files are in the page cache, then let them take turns."""
    if results.has("startup"):
        return
    rounds = QUICK_ROUNDS if plan.quick else max(FEWEST_ROUNDS, plan.rounds)
    texts = plan.workload.texts[: QUICK_MOST_TEXTS if plan.quick else MOST_TEXTS]
    starts: dict[str, list[Start]] = {starter.party: [] for starter in starters}
    failed: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts), encoding="utf-8")
        with steps(progress, "startup", len(starters) * (rounds + 1)) as done:
            for round_, starter in interleave(starters, rounds + 1):
                if starter.party not in failed:
                    try:
                        start = run_start(starter, file)
                    except EngineError as error:
                        failed.add(starter.party)
                        results.fail("startup", starter.party, error)
                    else:
                        if round_ > 0:
                            taken = starts[starter.party]
                            taken.append(start)
                            results.startup[starter.party] = _result(starter, taken, len(texts))
                done(starter.party)
    results.finish("startup")


def run_start(starter: Starter, texts: Path) -> Start:
    """Start the process, time it until it says `ready`, let it encode the texts, and end it.

    Raises:
        EngineError: it ended, or was ended after `LONGEST_S`, without a vector or without those of the texts.
    """
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as neutral:
        errors = Path(neutral) / "stderr"
        said: dict[str, int] = {}
        seconds = 0.0
        with errors.open("wb") as sink:
            began = time.perf_counter()
            process = subprocess.Popen(
                (*starter.command, str(texts)),
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
                        said[word] = int(peak)
                        seconds = seconds or time.perf_counter() - began
                    if word == DONE:
                        _let_end(process)
                        break
            too_long.cancel()
        if READY not in said or DONE not in said:
            last = errors.read_text(errors="replace").strip().splitlines()[-1:]
            missing = "its first vector" if READY not in said else "those of the texts"
            raise EngineError(f"ended with status {process.returncode} before {missing}: {' '.join(last)}")
    return Start(seconds=seconds, first_vector_bytes=said[READY], peak_bytes=said[DONE])


def _let_end(process: subprocess.Popen[str]) -> None:
    """Wait for a process whose work is done, and end it where threads of its library keep it from ending."""
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _result(starter: Starter, starts: Sequence[Start], texts: int) -> StartupResult:
    seconds = tuple(start.seconds for start in starts)
    return StartupResult(
        party=starter.party,
        min_cosine=starter.min_cosine,
        samples_s=seconds,
        median_s=median(seconds),
        first_vector_bytes=round(median([start.first_vector_bytes for start in starts])),
        texts=texts,
        peak_bytes=round(median([start.peak_bytes for start in starts])),
        installed_bytes=starter.installed_bytes,
    )
