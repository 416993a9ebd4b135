"""Suite `peers`: other libraries on the same weights and texts, in rounds that take turns with ours.

A party's name is engine and precision of ours, or title and backend of a peer. The conditions of a peer's rate name its
version, the number format that it computes in, and its best batch size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest

import numpy as np
from rich.progress import Progress

from benchmarks.agreement import Components, encode_components, fp32_reference, record_agreement
from benchmarks.peers.environments import find_environment
from benchmarks.peers.protocol import time_calls
from benchmarks.peers.specs import FOLDER, PEERS, PeerBackend, worker_command
from benchmarks.plan import Plan, Runner, Suite, loaded, steps, take_turns
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from benchmarks.report.statistics import ratio_of_medians
from benchmarks.suites.latency import calls_a_round, texts_in_turn
from benchmarks.suites.quality import Judge
from benchmarks.suites.startup import Starter
from benchmarks.suites.throughput import Rounds
from benchmarks.workers import WorkerProcess
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


@dataclass(frozen=True, kw_only=True)
class Party:
    """One of ours or of theirs, loaded.

    Attributes:
        samples_s: seconds of each pass over the workload.
        run: pass over the workload, and record the passes so far.
        vectors: encode texts, float32 [texts, dim].
        single: encode one text a call, in turn, so many times, and return each call's milliseconds.
    """

    name: str
    samples_s: list[float]
    run: Callable[[], None]
    vectors: Callable[[Sequence[str]], Components]
    single: Callable[[Sequence[str], int], list[float]]


def prepare_peers(plan: Plan, recorder: Recorder, progress: Progress) -> Plan:
    """Install the chosen peers and export what their backends need. Failures are recorded, and the peer is left out.

    Returns:
        The plan with the backends, and with suite `startup` the commands that start them.
    """
    specs = [spec for spec in PEERS if spec.title in plan.peers]
    backends: list[PeerBackend] = []
    starters: list[Starter] = []
    environments, say = plan.environments, partial(progress.console.print, style="dim", markup=False)
    with steps(progress, "prepare peers", sum(1 + len(spec.backends) for spec in specs)) as done:
        for spec in specs:
            done(f"{spec.title}: environment")
            python = None
            with recorder.failing(SUITE, spec.title, OSError):
                python = find_environment(spec.name, FOLDER, environments.given, environments.folder, say)
            for name, package in spec.backends.items() if python is not None else ():
                party, model, command = f"{spec.title} {name}", plan.bundle.resolve(), worker_command(python, spec.name)
                done(party)
                with (
                    recorder.failing(SUITE, party, OSError),
                    WorkerProcess(command, plan.scratch / "prepare.log") as worker,
                ):
                    needed = spec.exports.get(name)
                    if needed is not None and not (model / needed).is_file():
                        source, model = model, plan.scratch / party.replace(" ", "-")
                        texts = plan.workload.texts
                        worker.ask("export", model=str(source), backend=name, output=str(model), texts=texts)
                        if not (model / needed).is_file():
                            raise PeerError(f"its export left no {needed}")
                    backends.append(PeerBackend(party, command, model, name, package))
                    if Suite.STARTUP in plan.suites:
                        starters.append(Starter(party, command, model, name, worker.ask("size")["bytes"]))
    return replace(plan, peer_backends=tuple(backends), peer_starters=tuple(starters))


def run_peers(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Find each prepared peer's best batch size, compare vectors with the bundle's fp32, then let all take turns.

    With suite `quality`, people's scores judge each peer's vectors, too.
    """
    with ExitStack() as stack:
        runners = stack.enter_context(loaded(plan, recorder, Suite.PEERS))
        ours = [_ours(plan, runner, recorder) for runner in runners]
        theirs, sizes = [], QUICK_BATCH_SIZES if plan.quick else BATCH_SIZES
        with steps(progress, "peers: load and sweep", len(plan.peer_backends) * (1 + len(sizes))) as done:
            for backend in plan.peer_backends:
                with recorder.failing(SUITE, backend.party, OSError):
                    worker = WorkerProcess(backend.command, plan.scratch / f"{backend.party}.log")
                    theirs.append(_load(plan, backend, stack.enter_context(worker), recorder, done))
        alternating = [party for party in chain(*zip_longest(ours, theirs)) if party is not None]
        parties = _compare_vectors(plan, alternating, runners, recorder, progress)
        _interleave(plan, parties, lambda party: party.run(), recorder, progress, "")
        _time_single_texts(plan, parties, recorder, progress)
        _record_ratios(plan, ours, theirs, recorder)
        if Suite.QUALITY in plan.suites:
            judge, peers = Judge(plan, recorder), [peer for peer in theirs if peer in parties]
            with steps(progress, "peers: quality", len(peers)) as done:
                for peer in peers:
                    with recorder.failing(Suite.QUALITY.value, peer.name):
                        judge.judge(peer.name, peer.vectors(judge.texts), keep_cosines=False)
                    done(peer.name)


def _ours(plan: Plan, runner: Runner, recorder: Recorder) -> Party:
    rounds = Rounds(runner=runner, texts=plan.workload.texts)

    def run() -> None:
        rounds.run()
        rounds.record(recorder, SUITE, plan)

    vectors, single = partial(encode_components, plan, runner), partial(time_calls, runner.encoder.encode)
    return Party(name=runner.variant.name, samples_s=rounds.samples_s, run=run, vectors=vectors, single=single)


def _load(
    plan: Plan, backend: PeerBackend, worker: WorkerProcess, recorder: Recorder, done: Callable[[str], None]
) -> Party:
    """Load a peer and find its best batch size. Its own process measures its times.

    Every size has one untimed pass, as shapes may be compiled, then the better of two.
    """
    texts, samples_s, sweep = plan.workload.texts, list[float](), dict[int, float]()
    limit = min(QUICK_SWEEP_TEXTS if plan.quick else FULL_SWEEP_TEXTS, len(texts))
    answer = worker.ask("load", model=str(backend.model), backend=backend.name, texts=texts)
    done(backend.party)
    for size in QUICK_BATCH_SIZES if plan.quick else BATCH_SIZES:
        passes = [worker.ask("encode", batch_size=size, limit=limit)["seconds"] for _ in range(3)]
        sweep[size] = min(passes[1:])
        done(f"{backend.party}, batch {size}")
    best = min(sweep, key=lambda size: sweep[size])
    versions = worker.ask("versions")["versions"]
    fact = partial(recorder.record, SUITE, backend.party)
    fact("load time", answer["load_seconds"], unit="s")
    if answer["threads"] is not None:
        fact("threads", answer["threads"])
    for size, seconds in sweep.items():
        conditions = {"batch size": size, "texts": limit}
        fact("texts per second, sweep", limit / seconds, unit="1/s", conditions=conditions)

    def run() -> None:
        samples_s.append(worker.ask("encode", batch_size=best, limit=None)["seconds"])
        fact(
            "texts per second", *(len(texts) / seconds for seconds in samples_s), unit="1/s", better=Better.HIGHER,
            conditions={
                "version": versions.get(backend.package, "unknown"), "computes in": answer["precision"],
                "batch size": best, "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
            },
        )  # fmt: skip

    def vectors(texts: Sequence[str]) -> Components:
        output = plan.scratch / "vectors.npy"
        worker.ask("dump", batch_size=best, output=str(output), texts=texts)
        found: Components = np.load(output).astype(np.float32)
        expected = (len(texts), plan.manifest.encoder.dim)
        if found.shape != expected or not np.isfinite(found).all():
            raise PeerError(f"its vectors have shape {found.shape} where {expected} is expected, or are not finite")
        return found

    def single(texts: Sequence[str], calls: int) -> list[float]:
        samples: list[float] = worker.ask("single", texts=texts, calls=calls)["samples_ms"]
        return samples

    return Party(name=backend.party, samples_s=samples_s, run=run, vectors=vectors, single=single)


def _compare_vectors(
    plan: Plan, parties: Sequence[Party], runners: Sequence[Runner], recorder: Recorder, progress: Progress
) -> list[Party]:
    """Record every party's agreement with the bundle's fp32, which warms it, and return those that did not fail."""
    texts, left = plan.workload.texts, []
    reference = fp32_reference(plan, "workload", texts, recorder, Suite.PEERS, runners)
    with steps(progress, "peers: vectors", len(parties)) as done:
        for party in parties:
            with recorder.failing(SUITE, party.name):
                record_agreement(recorder, Suite.PEERS, party.name, party.vectors(texts), reference)
                left.append(party)
            done(party.name)
    return left


def _time_single_texts(plan: Plan, parties: Sequence[Party], recorder: Recorder, progress: Progress) -> None:
    """Measure all parties on one text per call."""
    try:
        texts = texts_in_turn(plan, SINGLE_TOKENS)
    except InputError as error:
        recorder.fail(SUITE, "single texts", error)
        return
    samples: dict[str, list[float]] = {party.name: [] for party in parties}

    def run(party: Party) -> None:
        samples[party.name] += party.single(texts, calls_a_round(plan))
        recorder.record(
            SUITE, party.name, "time per text", *samples[party.name], unit="ms", better=Better.LOWER,
            conditions={"tokens": SINGLE_TOKENS},
        )  # fmt: skip

    _interleave(plan, parties, run, recorder, progress, ", single texts")


def _interleave(
    plan: Plan, parties: Sequence[Party], run: Callable[[Party], None], recorder: Recorder, progress: Progress,
    what: str,
) -> None:  # fmt: skip
    """Interleave the parties' rounds, with a pause before each."""

    def turn(party: Party, _round: int) -> None:
        time.sleep(SETTLE_S)
        run(party)

    turns = {party.name: partial(turn, party) for party in parties}
    with steps(progress, f"peers: rounds{what}", len(parties) * plan.rounds) as done:
        take_turns(turns, plan.rounds, lambda name, error: recorder.fail(SUITE, name + what, error), done)


def _record_ratios(plan: Plan, ours: Sequence[Party], theirs: Sequence[Party], recorder: Recorder) -> None:
    """Record how many times as fast each of ours is as each peer, with a bootstrap interval over the rounds."""
    for mine in ours:
        for peer in theirs:
            if mine.samples_s and peer.samples_s:  # or it failed, and the record has the reason
                ratio = ratio_of_medians(peer.samples_s, mine.samples_s, seed=plan.seed)  # seconds: theirs over ours
                recorder.record(
                    SUITE, peer.name, "our rate over its rate", ratio.value,
                    conditions={"ours": mine.name}, figures={"low": ratio.low, "high": ratio.high},
                )  # fmt: skip
