"""Suite `peers`: other libraries on the same weights and texts, in rounds that take turns with ours.

A party's name is engine and precision of ours, or title and backend of a peer. The conditions of a peer's rate name its
version, the number format that it computes in, and its best batch size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich.progress import Progress

from benchmarks.agreement import Components, fp32_reference, record_agreement
from benchmarks.peers.environments import existing_environment, make_environment
from benchmarks.peers.footprint import environment_bytes
from benchmarks.peers.specs import FOLDER, PEERS, PeerBackend, PeerSpec
from benchmarks.plan import Plan, Runner, Suite, loaded, steps, take_turns
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from benchmarks.report.statistics import ratio_of_medians
from benchmarks.suites.latency import calls_a_round, texts_in_turn
from benchmarks.suites.quality import Judge
from benchmarks.suites.startup import Starter
from benchmarks.suites.throughput import Rounds
from benchmarks.workers import WorkerProcess, offline_environment
from mirror_runtime.errors import InputError, PeerError

SUITE = Suite.PEERS.value

BATCH_SIZES = (8, 16, 32, 64, 128)
QUICK_BATCH_SIZES = (16, 64)
FULL_SWEEP_TEXTS = 1024
QUICK_SWEEP_TEXTS = 64

SINGLE_TOKENS = 16
"""Of single texts: a short sentence, special tokens included."""

SETTLE_S = 0.25
"""Pause between parties: a library's threads may go on spinning for a while after its last call."""


@dataclass(kw_only=True)
class PeerRounds:
    """The rounds of one loaded peer at its best batch size.

    Attributes:
        backend: what is measured.
        worker: its process.
        loaded: its answer to `load`.
        sweep: seconds by batch size.
        texts: of the workload.
        samples_s: seconds of each round, as the peer's own process measured them.
    """

    backend: PeerBackend
    worker: WorkerProcess
    loaded: Mapping[str, Any]
    sweep: Mapping[int, float]
    texts: int
    samples_s: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the party."""
        return self.backend.party

    @property
    def batch_size(self) -> int:
        """The fastest of the sweep."""
        return min(self.sweep, key=lambda size: self.sweep[size])

    def run(self) -> None:
        """Encode the workload once and keep its time.

        Raises:
            PeerError: the peer failed.
        """
        self.samples_s.append(float(self.worker.ask("encode", batch_size=self.batch_size, limit=None)["seconds"]))

    def record(self, recorder: Recorder, suite: str, _plan: Plan) -> None:
        """Record the rounds so far."""
        versions = self.loaded["versions"]
        recorder.record(
            suite, self.name, "texts per second", *(self.texts / seconds for seconds in self.samples_s), unit="1/s",
            better=Better.HIGHER,
            conditions={
                "version": versions.get(self.backend.package, "unknown"),
                "computes in": self.loaded["precision"],
                "batch size": self.batch_size,
                "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
            },
        )  # fmt: skip

    def vectors(self, plan: Plan, texts: Sequence[str]) -> Components:
        """Encode texts, and return their vectors, float32 [texts, dim].

        Raises:
            PeerError: the peer failed, or its vectors have another shape or are not finite.
        """
        output = plan.scratch / "vectors.npy"
        listed = _write_texts(plan.scratch / "dump.json", texts)
        self.worker.ask("dump", batch_size=self.batch_size, output=str(output), texts=str(listed))
        found: Components = np.load(output).astype(np.float32)
        expected = (len(texts), plan.manifest.encoder.dim)
        if found.shape != expected or not np.isfinite(found).all():
            raise PeerError(f"its vectors have shape {found.shape} where {expected} is expected, or are not finite")
        return found

    def single(self, plan: Plan, texts: Sequence[str], calls: int) -> list[float]:
        """Encode one text a call, in turn, and return each call's milliseconds, as the peer's process measured them.

        Raises:
            PeerError: the peer failed.
        """
        listed = _write_texts(plan.scratch / "single.json", texts)
        samples: list[float] = self.worker.ask("single", texts=str(listed), calls=calls)["samples_ms"]
        return samples


Party: TypeAlias = "Rounds | PeerRounds"


def prepare_peers(plan: Plan, recorder: Recorder, progress: Progress) -> Plan:
    """Install the chosen peers and export what their backends need. Failures are recorded, and the peer is left out.

    Returns:
        The plan with the backends, and with suite `startup` the commands that start them.
    """
    specs = [spec for spec in PEERS if spec.title in plan.peers]
    texts = _write_texts(plan.scratch / "texts.json", plan.workload.texts)
    backends: list[PeerBackend] = []
    starters: list[Starter] = []
    with steps(progress, "prepare peers", sum(1 + len(spec.backends) for spec in specs)) as done:
        for spec in specs:
            done(f"{spec.title}: environment")
            python = None
            with recorder.failing(SUITE, spec.title, OSError):
                python = _make_python(spec, plan, lambda line: progress.console.print(line, style="dim", markup=False))
            for name in spec.backends if python is not None else ():
                done(f"{spec.title}: {name}")
                backend = PeerBackend(spec=spec, name=name, python=python, model=plan.bundle.resolve())
                with recorder.failing(SUITE, backend.party, OSError):
                    backends.append(backend := _export(backend, plan.scratch, texts))
                    if Suite.STARTUP in plan.suites:
                        with recorder.failing(Suite.STARTUP.value, backend.party):
                            starters.append(_starter(backend))
    return replace(plan, peer_backends=tuple(backends), peer_starters=tuple(starters))


def run_peers(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Find each prepared peer's best batch size, compare vectors with the bundle's fp32, then let all take turns.

    With suite `quality`, people's scores judge each peer's vectors, too.
    """
    sizes = QUICK_BATCH_SIZES if plan.quick else BATCH_SIZES
    with ExitStack() as stack:
        runners = stack.enter_context(loaded(plan, recorder, Suite.PEERS))
        ours = [Rounds(runner=runner, texts=plan.workload.texts) for runner in runners]
        with steps(progress, "peers: load and sweep", len(plan.peer_backends) * (1 + len(sizes))) as done:
            theirs = list(_load(plan, sizes, stack, recorder, done))
        pairs: Iterable[tuple[Party | None, ...]] = zip_longest(ours, theirs)  # ours and theirs alternate
        parties = [party for pair in pairs for party in pair if party is not None]
        parties = _compare_vectors(plan, parties, runners, recorder, progress)
        _measure_rates(plan, parties, recorder, progress)
        _time_single_texts(plan, parties, recorder, progress)
        _record_ratios(plan, ours, theirs, recorder)
        if Suite.QUALITY in plan.suites:
            _judge(plan, [party for party in parties if isinstance(party, PeerRounds)], recorder, progress)


def _write_texts(file: Path, texts: Sequence[str]) -> Path:
    """Write texts for a peer: as JSON, since a text may contain any character."""
    file.write_text(json.dumps(list(texts)), encoding="utf-8")
    return file


def _make_python(spec: PeerSpec, plan: Plan, on_progress: Callable[[str], None]) -> Path:
    """Return the Python of a peer's environment: the user's own, or one of ours, which is made if it is missing."""
    given = plan.environments.given.get(spec.name)
    if given is not None:
        return existing_environment(given.absolute())
    folder = (plan.environments.folder / spec.name).absolute()
    return make_environment(FOLDER / f"{spec.name}.txt", folder, on_progress)


def _export(backend: PeerBackend, scratch: Path, texts: Path) -> PeerBackend:
    """Return the backend with a copy of the model that has its files, unless the bundle has them already."""
    if backend.ready:
        return backend
    copy = backend.exported_to(scratch)
    with WorkerProcess(backend.command, scratch / "export.log") as worker:
        worker.ask(
            "export", model=str(backend.model), backend=backend.name, output=str(copy.model), texts=str(texts)
        )  # fmt: skip
    if not copy.ready:
        raise PeerError(f"its export left no {backend.needed_file}")
    return copy


def _starter(backend: PeerBackend) -> Starter:
    return Starter(
        party=backend.party,
        command=(*backend.command, "start", str(backend.model), backend.name),
        installed_bytes=environment_bytes(backend.python),
        environment=offline_environment(),
    )


def _load(
    plan: Plan, sizes: Sequence[int], stack: ExitStack, recorder: Recorder, done: Callable[[str], None]
) -> Iterator[PeerRounds]:
    """Load every peer and try every batch size: one untimed pass, as shapes may be compiled, then the better of two."""
    texts = _write_texts(plan.scratch / "texts.json", plan.workload.texts)
    limit = min(QUICK_SWEEP_TEXTS if plan.quick else FULL_SWEEP_TEXTS, len(plan.workload.texts))
    for backend in plan.peer_backends:
        party, sweep = backend.party, {}
        try:
            worker = stack.enter_context(WorkerProcess(backend.command, plan.scratch / f"{backend.file_name}.log"))
            answer = worker.ask("load", model=str(backend.model), backend=backend.name, texts=str(texts))
            done(party)
            for size in sizes:
                passes = [worker.ask("encode", batch_size=size, limit=limit)["seconds"] for _ in range(3)]
                sweep[size] = min(map(float, passes[1:]))
                done(f"{party}, batch {size}")
        except (PeerError, OSError) as error:
            recorder.fail(SUITE, party, error)
            continue
        fact = partial(recorder.record, SUITE, party)
        fact("load time", answer["load_seconds"], unit="s")
        if answer["threads"] is not None:
            fact("threads", answer["threads"])
        for size, seconds in sweep.items():
            conditions = {"batch size": size, "texts": limit}
            fact("texts per second, sweep", limit / seconds, unit="1/s", conditions=conditions)
        count = len(plan.workload.texts)
        yield PeerRounds(backend=backend, worker=worker, loaded=answer, sweep=sweep, texts=count)


def _compare_vectors(
    plan: Plan, parties: Sequence[Party], runners: Sequence[Runner], recorder: Recorder, progress: Progress
) -> list[Party]:
    """Record every party's agreement with the bundle's fp32, which warms it, and return those that did not fail."""
    texts, left = plan.workload.texts, []
    reference = fp32_reference(plan, "workload", texts, recorder, Suite.PEERS, runners)
    with steps(progress, "peers: vectors", len(parties)) as done:
        for party in parties:
            with recorder.failing(SUITE, party.name):
                record_agreement(recorder, Suite.PEERS, party.name, party.vectors(plan, texts), reference)
                left.append(party)
            done(party.name)
    return left


def _measure_rates(plan: Plan, parties: Sequence[Party], recorder: Recorder, progress: Progress) -> None:
    """Measure all parties on the workload."""

    def run(party: Party) -> None:
        party.run()
        party.record(recorder, SUITE, plan)

    _interleave(plan, parties, run, recorder, progress, "")


def _time_single_texts(plan: Plan, parties: Sequence[Party], recorder: Recorder, progress: Progress) -> None:
    """Measure all parties on one text per call."""
    try:
        texts = texts_in_turn(plan, SINGLE_TOKENS)
    except InputError as error:
        recorder.fail(SUITE, "single texts", error)
        return
    samples: dict[str, list[float]] = {party.name: [] for party in parties}

    def run(party: Party) -> None:
        samples[party.name] += party.single(plan, texts, calls_a_round(plan))
        recorder.record(
            SUITE, party.name, "time per text", *samples[party.name], unit="ms", better=Better.LOWER,
            conditions={"tokens": SINGLE_TOKENS},
        )  # fmt: skip

    _interleave(plan, parties, run, recorder, progress, ", single texts")


def _interleave(
    plan: Plan,
    parties: Sequence[Party],
    run: Callable[[Party], None],
    recorder: Recorder,
    progress: Progress,
    what: str,
) -> None:
    """Interleave the parties' rounds, with a pause before each."""

    def turn(party: Party, _round: int) -> None:
        time.sleep(SETTLE_S)
        run(party)

    turns = {party.name: partial(turn, party) for party in parties}
    with steps(progress, f"peers: rounds{what}", len(parties) * plan.rounds) as done:
        take_turns(turns, plan.rounds, lambda name, error: recorder.fail(SUITE, name + what, error), done)


def _record_ratios(plan: Plan, ours: Sequence[Rounds], theirs: Sequence[PeerRounds], recorder: Recorder) -> None:
    """Record how many times as fast each of ours is as each peer, with a bootstrap interval over the rounds."""
    for mine in ours:
        for peer in theirs:
            if not mine.samples_s or not peer.samples_s:
                continue  # it failed, and the record has the reason
            ratio = ratio_of_medians(peer.samples_s, mine.samples_s, seed=plan.seed)  # seconds: theirs over ours
            recorder.record(
                SUITE, peer.name, "our rate over its rate", ratio.value,
                conditions={"ours": mine.name}, figures={"low": ratio.low, "high": ratio.high},
            )  # fmt: skip


def _judge(plan: Plan, theirs: Sequence[PeerRounds], recorder: Recorder, progress: Progress) -> None:
    judge = Judge(plan, recorder)
    with steps(progress, "peers: quality", len(theirs)) as done:
        for peer in theirs:
            with recorder.failing(Suite.QUALITY.value, peer.name):
                judge.judge(peer.name, peer.vectors(plan, judge.texts), keep_cosines=False)
            done(peer.name)
