"""Suite `peers`: other libraries on the same weights and texts, in rounds that take turns with ours.

A party's name is engine and precision of ours, or title and backend of a peer. The conditions of a peer's rate name its
version, the number format that it computes in, and its best batch size.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.agreement import encode_components, fp32_reference, record_agreement
from benchmarks.peers.environments import environment_python, existing_environment, is_complete, make_environment
from benchmarks.peers.footprint import environment_bytes
from benchmarks.peers.protocol import time_calls
from benchmarks.peers.specs import FOLDER, PEERS, PeerBackend, PeerSpec
from benchmarks.plan import Plan, Runner, Suite, interleave, loaded, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better, Measurement
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

Party: TypeAlias = "Rounds | PeerRounds"


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
        recorder.add(
            Measurement(
                suite=SUITE, party=self.backend.party, metric="texts per second", unit="1/s", better=Better.HIGHER,
                samples=tuple(self.texts / seconds for seconds in self.samples_s),
                conditions={
                    "version": versions.get(self.backend.package, "unknown"),
                    "computes in": self.loaded["precision"],
                    "batch size": self.batch_size,
                    "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
                },
            )
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
            try:
                python = _make_python(spec, plan, lambda line: progress.console.print(line, style="dim", markup=False))
            except (PeerError, OSError) as error:
                recorder.fail(SUITE, spec.title, error)
                continue
            for name in spec.backends:
                done(f"{spec.title}: {name}")
                backend = PeerBackend(spec=spec, name=name, python=python, model=plan.bundle.resolve())
                try:
                    backend = _export(backend, plan.scratch, texts)
                except (PeerError, OSError) as error:
                    recorder.fail(SUITE, backend.party, error)
                    continue
                if Suite.STARTUP in plan.suites:
                    starters += _starter(backend, recorder)
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
        ours = [Rounds(runner=runner, texts=plan.workload.texts) for runner in runners]
        with steps(progress, "peers: load and sweep", len(backends) * (1 + len(sizes))) as done:
            theirs = list(_load(plan, backends, sizes, stack, scratch, recorder, done))
        _compare_vectors(plan, ours, theirs, scratch, recorder, progress)
        _take_turns(plan, ours, theirs, recorder, progress)
        _time_single_texts(plan, runners, theirs, scratch, recorder, progress)
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


def _starter(backend: PeerBackend, recorder: Recorder) -> Iterator[Starter]:
    try:
        size = environment_bytes(backend.python)
    except PeerError as error:
        recorder.fail(Suite.STARTUP.value, backend.party, error)
        return
    yield Starter(
        party=backend.party,
        command=(*backend.command, "start", str(backend.model), backend.name),
        installed_bytes=size,
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
        recorder.fact(SUITE, party, "load time", answer["load_seconds"], unit="s")
        if answer["threads"] is not None:
            recorder.fact(SUITE, party, "threads", answer["threads"])
        for size, seconds in sweep.items():
            conditions = {"batch size": size, "texts": limit}
            recorder.fact(
                SUITE, party, "texts per second, sweep", limit / seconds, unit="1/s", conditions=conditions
            )  # fmt: skip
        yield PeerRounds(
            backend=backend, worker=worker, loaded=answer, sweep=sweep, texts=len(plan.workload.texts)
        )  # fmt: skip


def _compare_vectors(
    plan: Plan, ours: list[Rounds], theirs: list[PeerRounds], scratch: Path, recorder: Recorder, progress: Progress
) -> None:
    """Record every party's agreement with the bundle's fp32; a party that fails is removed. Warms every party."""
    texts = plan.workload.texts
    runners = [mine.runner for mine in ours]
    reference = fp32_reference(plan, "workload", texts, recorder, Suite.PEERS, runners)
    with steps(progress, "peers: vectors", len(ours) + len(theirs)) as done:
        for mine in list(ours):
            name = mine.runner.variant.name
            try:
                record_agreement(recorder, Suite.PEERS, name, encode_components(plan, mine.runner, texts), reference)
            except MirrorError as error:
                ours.remove(mine)
                recorder.fail(SUITE, name, error)
            done(name)
        for peer in list(theirs):
            name = peer.backend.party
            try:
                vectors = peer.vectors(texts, plan.manifest.encoder.dim, scratch)
            except MirrorError as error:
                theirs.remove(peer)
                recorder.fail(SUITE, name, error)
            else:
                record_agreement(recorder, Suite.PEERS, name, vectors, reference)
            done(name)


def _take_turns(
    plan: Plan, ours: Sequence[Rounds], theirs: Sequence[PeerRounds], recorder: Recorder, progress: Progress
) -> None:
    """Measure all parties on the workload in interleaved rounds, ours and theirs alternating."""
    pairs: list[tuple[Party | None, Party | None]] = list(zip_longest(ours, theirs))
    parties = [party for pair in pairs for party in pair if party is not None]

    def run(party: Party) -> None:
        party.run()
        if isinstance(party, Rounds):
            party.record(recorder, SUITE, plan)
        else:
            party.record(recorder)

    with steps(progress, "peers: rounds", len(parties) * plan.rounds) as done:
        _rounds([(_name(party), party) for party in parties], plan.rounds, run, recorder, done, "")


def _time_single_texts(
    plan: Plan,
    runners: Sequence[Runner],
    theirs: Sequence[PeerRounds],
    scratch: Path,
    recorder: Recorder,
    progress: Progress,
) -> None:
    """Measure all parties on one text per call, in interleaved rounds."""
    try:
        texts = texts_in_turn(plan, SINGLE_TOKENS)
    except InputError as error:
        recorder.fail(SUITE, "single texts", error)
        return
    file = _write_texts(scratch / "single.json", texts)
    calls = calls_a_round(plan)
    samples: dict[str, list[float]] = {}
    parties: list[tuple[str, Runner | PeerRounds]] = [(runner.variant.name, runner) for runner in runners]
    parties += [(peer.backend.party, peer) for peer in theirs]

    def run(party: Runner | PeerRounds) -> None:
        if isinstance(party, Runner):
            name, found = party.variant.name, time_calls(party.encoder.encode, texts, calls)
        else:
            name = party.backend.party
            found = party.worker.ask("single", texts=str(file), calls=calls)["samples_ms"]
        samples.setdefault(name, []).extend(found)
        recorder.add(
            Measurement(
                suite=SUITE, party=name, metric="time per text", unit="ms", better=Better.LOWER,
                samples=tuple(samples[name]), conditions={"tokens": SINGLE_TOKENS},
            )
        )  # fmt: skip

    with steps(progress, "peers: single texts", len(parties) * plan.rounds) as done:
        _rounds(parties, plan.rounds, run, recorder, done, ", single texts")


def _rounds(
    parties: Sequence[tuple[str, Any]],
    rounds: int,
    run: Callable[[Any], None],
    recorder: Recorder,
    done: Callable[[str], None],
    what: str,
) -> None:
    """Interleave parties; one that fails is recorded and left out from then on."""
    failed: set[str] = set()
    for _, (name, party) in interleave(parties, rounds):
        if name not in failed:
            time.sleep(SETTLE_S)
            try:
                run(party)
            except MirrorError as error:
                failed.add(name)
                recorder.fail(SUITE, f"{name}{what}", error)
        done(name)


def _record_ratios(plan: Plan, ours: Sequence[Rounds], theirs: Sequence[PeerRounds], recorder: Recorder) -> None:
    """Record how many times as fast each of ours is as each peer, with a bootstrap interval over the rounds."""
    for mine in ours:
        for peer in theirs:
            if not mine.samples_s or not peer.samples_s:
                continue  # it failed, and the record has the reason
            ratio = ratio_of_medians(peer.samples_s, mine.samples_s, seed=plan.seed)  # seconds: theirs over ours
            recorder.fact(
                SUITE, peer.backend.party, "our rate over its rate", ratio.value,
                conditions={"ours": mine.runner.variant.name}, figures={"low": ratio.low, "high": ratio.high},
            )  # fmt: skip


def _judge(plan: Plan, theirs: Sequence[PeerRounds], scratch: Path, recorder: Recorder, progress: Progress) -> None:
    judge = Judge(plan, recorder)
    with steps(progress, "peers: quality", len(theirs)) as done:
        for peer in theirs:
            name = peer.backend.party
            try:
                vectors = peer.vectors(judge.texts, plan.manifest.encoder.dim, scratch)
                judge.judge(name, vectors, keep_cosines=False)
            except MirrorError as error:
                recorder.fail(Suite.QUALITY.value, name, error)
            done(name)


def _name(party: Party) -> str:
    return party.runner.variant.name if isinstance(party, Rounds) else party.backend.party
