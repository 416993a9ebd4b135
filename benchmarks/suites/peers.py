"""Suite `peers`: other libraries on the same weights and texts, in rounds that take turns with ours.

A party's name is engine and precision of ours, or title and backend of a peer. The conditions of a peer's rate name its
version, the number format that it computes in, and its best batch size.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.agreement import encode_components, fp32_reference, record_agreement
from benchmarks.peers.environments import environment_python, existing_environment, is_complete, make_environment
from benchmarks.peers.footprint import environment_bytes
from benchmarks.peers.protocol import time_calls
from benchmarks.peers.specs import FOLDER, PEERS, PeerBackend, PeerSpec
from benchmarks.plan import Plan, Suite, loaded, steps, take_turns
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from benchmarks.report.statistics import ratio_of_medians
from benchmarks.suites.latency import calls_a_round, texts_in_turn
from benchmarks.suites.quality import Judge
from benchmarks.suites.startup import Starter
from benchmarks.suites.throughput import Rounds
from benchmarks.workers import WorkerProcess, offline_environment
from mirror_runtime.errors import InputError, MirrorError, PeerError

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

    def record(self, recorder: Recorder) -> None:
        """Record the rounds so far."""
        versions = self.loaded["versions"]
        recorder.record(
            SUITE, self.name, "texts per second", *(self.texts / seconds for seconds in self.samples_s), unit="1/s",
            better=Better.HIGHER,
            conditions={
                "version": versions.get(self.backend.package, "unknown"),
                "computes in": self.loaded["precision"],
                "batch size": self.batch_size,
                "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
            },
        )  # fmt: skip

    def vectors(self, texts: Sequence[str], dim: int, scratch: Path) -> NDArray[np.float32]:
        """Encode texts, and return their vectors, float32 [texts, dim].

        Raises:
            PeerError: the peer failed, or its vectors have another shape or are not finite.
        """
        output = scratch / "vectors.npy"
        listed = _write_texts(scratch / "dump.json", texts)
        self.worker.ask("dump", batch_size=self.batch_size, output=str(output), texts=str(listed))
        found: NDArray[np.float32] = np.load(output).astype(np.float32)
        if found.shape != (len(texts), dim) or not np.isfinite(found).all():
            expected = (len(texts), dim)
            raise PeerError(f"its vectors have shape {found.shape} where {expected} is expected, or are not finite")
        return found


def prepare_peers(plan: Plan, recorder: Recorder, progress: Progress) -> list[Starter]:
    """Install the chosen peers and export what their backends need. Failures are recorded, and the peer is left out.

    Returns:
        The commands that suite `startup` runs, one for each backend.
    """
    specs = [spec for spec in PEERS if spec.title in plan.peers]
    texts = _write_texts(plan.scratch / "texts.json", plan.workload.texts)
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
                    backend = _export(backend, plan.scratch, texts)
                    if Suite.STARTUP in plan.suites:
                        with recorder.failing(Suite.STARTUP.value, backend.party):
                            starters.append(_starter(backend))
    return starters


def run_peers(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Find each prepared peer's best batch size, then let ours and theirs take turns, then compare their vectors.

    With suite `quality`, people's scores judge each peer's vectors, too.
    """
    backends = list(_prepared(plan))
    sizes = QUICK_BATCH_SIZES if plan.quick else BATCH_SIZES
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mirror-bench-", dir=plan.scratch)))
        runners = stack.enter_context(loaded(plan, recorder, Suite.PEERS))
        every = [Rounds(runner=runner, texts=plan.workload.texts) for runner in runners]
        ours = list(every)
        with steps(progress, "peers: load and sweep", len(backends) * (1 + len(sizes))) as done:
            theirs = list(_load(plan, backends, sizes, stack, scratch, recorder, done))
        _compare_vectors(plan, ours, theirs, scratch, recorder, progress)
        _take_turns(plan, ours, theirs, recorder, progress)
        _time_single_texts(plan, every, theirs, scratch, recorder, progress)
        _record_ratios(plan, ours, theirs, recorder)
        if Suite.QUALITY in plan.suites:
            _judge(plan, theirs, scratch, recorder, progress)


def _write_texts(file: Path, texts: Sequence[str]) -> Path:
    """Write texts for a peer: as JSON, since a text may contain any character."""
    file.write_text(json.dumps(list(texts)), encoding="utf-8")
    return file


def _environment(spec: PeerSpec, plan: Plan) -> Path:
    """Return the folder of a peer's environment, the user's own or one of ours."""
    given = plan.environments.given.get(spec.name)
    return (plan.environments.folder / spec.name if given is None else given).absolute()


def _make_python(spec: PeerSpec, plan: Plan, on_progress: Callable[[str], None]) -> Path:
    folder = _environment(spec, plan)
    if spec.name in plan.environments.given:
        return existing_environment(folder)
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


def _prepared(plan: Plan) -> Iterator[PeerBackend]:
    """Yield the backends that `prepare_peers` has made ready in this run."""
    for spec in PEERS:
        folder, own = _environment(spec, plan), spec.name in plan.environments.given
        python = environment_python(folder)
        if spec.title not in plan.peers or not python.is_file() or not (own or is_complete(folder)):
            continue
        for name in spec.backends:
            backend = PeerBackend(spec=spec, name=name, python=python, model=plan.bundle.resolve())
            for candidate in (backend, backend.exported_to(plan.scratch)):
                if candidate.ready:
                    yield candidate
                    break


def _load(
    plan: Plan,
    backends: Sequence[PeerBackend],
    sizes: Sequence[int],
    stack: ExitStack,
    scratch: Path,
    recorder: Recorder,
    done: Callable[[str], None],
) -> Iterator[PeerRounds]:
    """Load every peer and try every batch size: one untimed pass, as shapes may be compiled, then the better of two."""
    texts = _write_texts(scratch / "texts.json", plan.workload.texts)
    limit = min(QUICK_SWEEP_TEXTS if plan.quick else FULL_SWEEP_TEXTS, len(plan.workload.texts))
    for backend in backends:
        party, sweep = backend.party, {}
        try:
            worker = stack.enter_context(WorkerProcess(backend.command, scratch / f"{backend.file_name}.log"))
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
    plan: Plan, ours: list[Rounds], theirs: list[PeerRounds], scratch: Path, recorder: Recorder, progress: Progress
) -> None:
    """Record every party's agreement with the bundle's fp32; a party that fails is removed. Warms every party."""
    texts = plan.workload.texts
    runners = [mine.runner for mine in ours]
    reference = fp32_reference(plan, "workload", texts, recorder, Suite.PEERS, runners)
    with steps(progress, "peers: vectors", len(ours) + len(theirs)) as done:
        for mine in list(ours):
            try:
                vectors = encode_components(plan, mine.runner, texts)
                record_agreement(recorder, Suite.PEERS, mine.name, vectors, reference)
            except MirrorError as error:
                ours.remove(mine)
                recorder.fail(SUITE, mine.name, error)
            done(mine.name)
        for peer in list(theirs):
            try:
                vectors = peer.vectors(texts, plan.manifest.encoder.dim, scratch)
                record_agreement(recorder, Suite.PEERS, peer.name, vectors, reference)
            except MirrorError as error:
                theirs.remove(peer)
                recorder.fail(SUITE, peer.name, error)
            done(peer.name)


def _take_turns(
    plan: Plan, ours: Sequence[Rounds], theirs: Sequence[PeerRounds], recorder: Recorder, progress: Progress
) -> None:
    """Measure all parties on the workload in interleaved rounds, ours and theirs alternating."""

    def run(party: Rounds | PeerRounds) -> None:
        party.run()
        if isinstance(party, Rounds):
            party.record(recorder, SUITE, plan)
        else:
            party.record(recorder)

    pairs: Iterable[tuple[Rounds | PeerRounds | None, ...]] = zip_longest(ours, theirs)
    parties = {party.name: partial(run, party) for pair in pairs for party in pair if party is not None}
    _interleave(parties, plan, recorder, progress, "peers: rounds", "")


def _time_single_texts(
    plan: Plan, ours: Sequence[Rounds], theirs: Sequence[PeerRounds], scratch: Path, recorder: Recorder,
    progress: Progress,
) -> None:  # fmt: skip
    """Measure all parties on one text per call, in interleaved rounds."""
    try:
        texts = texts_in_turn(plan, SINGLE_TOKENS)
    except InputError as error:
        recorder.fail(SUITE, "single texts", error)
        return
    file = _write_texts(scratch / "single.json", texts)
    calls = calls_a_round(plan)
    parties: list[Rounds | PeerRounds] = [*ours, *theirs]
    samples: dict[str, list[float]] = {party.name: [] for party in parties}

    def run(party: Rounds | PeerRounds) -> None:
        if isinstance(party, Rounds):
            samples[party.name] += time_calls(party.runner.encoder.encode, texts, calls)
        else:
            samples[party.name] += party.worker.ask("single", texts=str(file), calls=calls)["samples_ms"]
        recorder.record(
            SUITE, party.name, "time per text", *samples[party.name], unit="ms", better=Better.LOWER,
            conditions={"tokens": SINGLE_TOKENS},
        )  # fmt: skip

    turns = {party.name: partial(run, party) for party in parties}
    _interleave(turns, plan, recorder, progress, "peers: single texts", ", single texts")


def _interleave(
    parties: Mapping[str, Callable[[], None]], plan: Plan, recorder: Recorder, progress: Progress, title: str, what: str
) -> None:
    """Interleave the parties' rounds, with a pause before each."""

    def turn(run: Callable[[], None], _round: int) -> None:
        time.sleep(SETTLE_S)
        run()

    turns = {name: partial(turn, run) for name, run in parties.items()}
    with steps(progress, title, len(parties) * plan.rounds) as done:
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


def _judge(plan: Plan, theirs: Sequence[PeerRounds], scratch: Path, recorder: Recorder, progress: Progress) -> None:
    judge = Judge(plan, recorder)
    with steps(progress, "peers: quality", len(theirs)) as done:
        for peer in theirs:
            with recorder.failing(Suite.QUALITY.value, peer.name):
                vectors = peer.vectors(judge.texts, plan.manifest.encoder.dim, scratch)
                judge.judge(peer.name, vectors, keep_cosines=False)
            done(peer.name)
