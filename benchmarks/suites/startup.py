"""Suite `startup`: seconds from process start to the first vector, each time in a fresh process, and its memory."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from rich.progress import Progress

import mirror_runtime
from benchmarks.peers.protocol import installed_bytes, normal
from benchmarks.plan import Plan, Suite, steps, take_turns
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from benchmarks.workers import WorkerProcess
from mirror_runtime.bundle import EngineName

SUITE = Suite.STARTUP.value
FEWEST_ROUNDS = 5
QUICK_ROUNDS = 1
MOST_TEXTS = 1000
QUICK_MOST_TEXTS = 100

BATCH_SIZE = 32
"""Of a peer: the default of most libraries."""

LONGEST_S = 180.0
"""Limit of one start, and of the texts after it: a party that has not answered by then is killed."""

SCRIPT = Path(__file__).resolve().parent / "startup_process.py"
PACKAGE = "mirror-runtime"

EXTRAS = {EngineName.ONNXRUNTIME: "cpu", EngineName.OPENVINO: "openvino"}
"""Extras of `pip install 'mirror-runtime[…]'` for the engines of a CPU."""


class Starter(NamedTuple):
    """A worker's command, what it loads, and the size of the packages that it needs."""

    party: str
    command: tuple[str, ...]
    model: Path
    backend: str
    installed_bytes: int


def our_starters(plan: Plan) -> list[Starter]:
    """Return the commands of our runtime, one for each variant."""
    command, bundle = (sys.executable, str(SCRIPT)), plan.bundle.resolve()
    return [Starter(one.name, command, bundle, one.name, our_bytes(one.engine)) for one in plan.variants]


def run_startup(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Start every party once untimed, so that files are in the page cache, then interleave timed starts."""
    starters = [*our_starters(plan), *plan.peer_starters]
    rounds = QUICK_ROUNDS if plan.quick else max(FEWEST_ROUNDS, plan.rounds)
    texts = plan.workload.texts[: QUICK_MOST_TEXTS if plan.quick else MOST_TEXTS]

    def turns(starter: Starter) -> Callable[[int], None]:
        starts: list[tuple[float, int, int]] = []
        fact = partial(recorder.record, SUITE, starter.party)

        def turn(round_: int) -> None:
            start = run_start(starter, texts)
            if round_ > 0:
                starts.append(start)
                seconds, first, peak = zip(*starts, strict=True)
                fact("time to the first vector", *seconds, unit="s", better=Better.LOWER)
                fact("memory at the first vector", *first, unit="B")
                fact("peak memory", *peak, unit="B")
                fact("texts for the peak", len(texts))
                fact("installed packages", starter.installed_bytes, unit="B")

        return turn

    with steps(progress, SUITE, len(starters) * (rounds + 1)) as done:
        parties = {starter.party: turns(starter) for starter in starters}
        take_turns(parties, rounds + 1, lambda name, error: recorder.fail(SUITE, name, error), done)


def run_start(starter: Starter, texts: Sequence[str]) -> tuple[float, int, int]:
    """Start the process, and let it encode a first text, then all.

    Returns:
        The seconds to the first vector, the peak memory in bytes then, and after the texts.

    Raises:
        PeerError: it ended, failed or was killed after `LONGEST_S`.
    """
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as neutral:
        began = time.perf_counter()
        with WorkerProcess(starter.command, Path(neutral) / "log", folder=Path(neutral)) as worker:
            worker.ask("load", LONGEST_S, model=str(starter.model), backend=starter.backend, texts=texts)
            seconds, first = time.perf_counter() - began, worker.peak_bytes()
            worker.ask("encode", LONGEST_S, batch_size=BATCH_SIZE, limit=None)
            return seconds, first, worker.peak_bytes()


@cache
def our_bytes(engine: EngineName) -> int:
    """Return the bytes of `pip install 'mirror-runtime[EXTRA]'` and its dependencies; 0 without an extra."""
    if engine not in EXTRAS:
        return 0
    needed = needed_by(PACKAGE, EXTRAS[engine])
    # This checkout may be installed in place: then the installer's list does not include our own files.
    ours = sum(file.stat().st_size for file in Path(mirror_runtime.__file__).parent.rglob("*") if file.is_file())
    return ours + installed_bytes(needed - {PACKAGE})


def needed_by(package: str, *extras: str) -> frozenset[str]:
    """Return the names of a package and its dependencies, as far as they are installed."""
    found: set[str] = set()
    waiting = [(package, extras)]
    for name, chosen in waiting:  # which grows
        try:
            requires = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        found.add(normal(name))
        for line in requires:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in (*chosen, "")):
                dependency = need.name, tuple(sorted(need.extras))
                waiting += [dependency] if dependency not in waiting else []
    return frozenset(found)
