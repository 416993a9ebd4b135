"""Suite `peers`: other libraries on the same weights and texts, in rounds that take turns with ours."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.footprint import environment_bytes
from benchmarks.peer_results import Comparison, PeerResult, SweepPoint
from benchmarks.peer_specs import FOLDER, PEERS, PeerPoint, PeerSpec
from benchmarks.peers.worker import PeerWorker, peer_environment
from benchmarks.quality import Judge
from benchmarks.session import Plan, Results, Runner, steps
from benchmarks.single_texts import SETTLE_S, run_single_texts
from benchmarks.startup import Starter
from benchmarks.summary import alternate, interleave, median, ratio_of_medians
from benchmarks.throughput import Rounds
from mirror_runtime.environments import existing_environment, make_environment
from mirror_runtime.errors import MirrorError, PeerError
from mirror_runtime.vectors import cosines

BATCH_SIZES = (8, 16, 32, 64, 128)
QUICK_BATCH_SIZES = (16, 64)
FULL_SWEEP_TEXTS = 1024
QUICK_SWEEP_TEXTS = 64


@dataclass(kw_only=True)
class PeerRounds:
    """The rounds of one loaded peer at its best batch size."""

    point: PeerPoint
    worker: PeerWorker
    loaded: Mapping[str, Any]
    sweep: tuple[SweepPoint, ...]
    batch_size: int
    texts: int
    dim: int
    samples_s: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Encode the workload once and keep its time, as the peer's own process saw it.

        Raises:
            PeerError: the peer failed.
        """
        self.samples_s.append(float(self.worker.ask("encode", batch_size=self.batch_size, limit=None)["seconds"]))

    def result(self) -> PeerResult:
        """Sum up the rounds so far."""
        return PeerResult(
            peer=self.point.spec.title,
            backend=self.point.backend,
            version=self.loaded["versions"].get(self.point.package, "unknown"),
            precision=self.loaded["precision"],
            threads=self.loaded["threads"],
            versions=self.loaded["versions"],
            load_s=self.loaded["load_seconds"],
            sweep=self.sweep,
            batch_size=self.batch_size,
            texts=self.texts,
            samples_s=tuple(self.samples_s),
            texts_per_s=self.texts / median(self.samples_s),
            texts_per_s_min=self.texts / max(self.samples_s),
            texts_per_s_max=self.texts / min(self.samples_s),
        )


def prepare_peers(
    plan: Plan, given: Mapping[str, Path], environments: Path, scratch: Path, results: Results, progress: Progress
) -> list[PeerPoint]:
    """Install every chosen peer that is not given, and export what its backends need. What fails is noted and left out.

    Args:
        plan: what is measured.
        given: environments that the caller made, by the peer's name.
        environments: where to make the others.
        scratch: for converted models; the bundle is never written to.
        results: where failures are noted.
        progress: for the bar.
    """
    points: list[PeerPoint] = []
    specs = [spec for spec in PEERS if spec.title in plan.peers]
    texts = _write_texts(scratch / "texts.json", plan.workload.texts)
    with steps(progress, "prepare peers", sum(1 + len(spec.backends) for spec in specs)) as done:
        for spec in specs:
            done(f"{spec.title}: environment")
            try:
                python = _python(spec, given, environments, lambda line: progress.console.print(line, style="dim"))
            except (PeerError, OSError) as error:
                results.fail("peers", spec.title, error)
                continue
            for backend in spec.backends:
                done(f"{spec.title}: {backend}")
                point = PeerPoint(spec=spec, backend=backend, python=python, model=plan.bundle.resolve())
                try:
                    points.append(_exported(point, scratch, texts))
                except (PeerError, OSError) as error:
                    results.fail("peers", point.name, error)
    return points


def peer_starters(points: Sequence[PeerPoint], results: Results) -> list[Starter]:
    """Give the commands that suite `startup` runs, one for each backend; what cannot be asked for its size is noted."""
    starters = []
    for point in points:
        try:
            size = environment_bytes(point.python)
        except PeerError as error:
            results.fail("startup", point.name, error)
            continue
        starters.append(
            Starter(
                party=point.name,
                min_cosine=None,
                command=(*point.command, "start", str(point.model), point.backend),
                installed_bytes=size,
                environment=peer_environment(),
            )
        )
    return starters


def run_peers(
    plan: Plan,
    runners: Sequence[Runner],
    points: Sequence[PeerPoint],
    judge: Judge | None,
    results: Results,
    progress: Progress,
) -> None:
    """Find each peer's best batch size, then let ours and theirs take turns, then compare vectors.

    With a judge, each peer's vectors are worth something by people's scores, too.
    """
    if results.has("peers"):
        return
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        scratch = Path(folder)
        ours = [Rounds(runner=runner, texts=plan.workload.texts) for runner in runners]
        with steps(progress, "peers: load and sweep", len(points) * (1 + len(_batch_sizes(plan)))) as done:
            theirs = _load_all(plan, points, stack, scratch, results, done)
        vectors: dict[str, NDArray[np.float32]] = {}
        with steps(progress, "peers: vectors", len(ours) + len(theirs)) as done:
            for mine in list(ours):
                name = mine.runner.point.name
                try:  # this is also our untimed pass
                    vectors[name] = mine.runner.encoder.encode(mine.texts)
                except MirrorError as error:
                    ours.remove(mine)
                    results.fail("peers", name, error)
                done(name)
            for peer in list(theirs):
                try:
                    vectors[peer.point.name] = _vectors(peer, scratch, plan.workload.texts)
                except PeerError as error:
                    theirs.remove(peer)
                    results.fail("peers", peer.point.name, error)
                done(peer.point.name)
        _take_turns(plan, ours, theirs, results, progress)
        parties: list[tuple[str, Runner | PeerWorker]] = [(mine.runner.point.name, mine.runner) for mine in ours]
        parties += [(peer.point.name, peer.worker) for peer in theirs]
        run_single_texts(plan, parties, scratch, results, progress)
        _compare(plan, ours, theirs, vectors, results)
        if judge is not None:
            _judge(theirs, judge, scratch, results, progress)
    results.finish("peers")


def _batch_sizes(plan: Plan) -> tuple[int, ...]:
    return QUICK_BATCH_SIZES if plan.quick else BATCH_SIZES


def _write_texts(file: Path, texts: Sequence[str]) -> Path:
    """Write texts for a peer: JSON, for a text may hold any character."""
    file.write_text(json.dumps(texts), encoding="utf-8")
    return file


def _python(spec: PeerSpec, given: Mapping[str, Path], environments: Path, say: Callable[[str], None]) -> Path:
    if spec.name in given:
        return existing_environment(given[spec.name].absolute())
    return make_environment(FOLDER / f"{spec.name}.txt", environments.absolute() / spec.name, say)


def _exported(point: PeerPoint, scratch: Path, texts: Path) -> PeerPoint:
    """Give the point a copy of the model with its backend's files, if the bundle has none of them."""
    needed = point.spec.exports.get(point.backend)
    if needed is None or (point.model / needed).is_file():
        return point
    output = scratch / point.file_name
    with PeerWorker(point.command, scratch / "export.log") as worker:
        worker.ask("export", model=str(point.model), backend=point.backend, output=str(output), texts=str(texts))
    if not (output / needed).is_file():
        raise PeerError(f"its export left no {needed}")
    return PeerPoint(spec=point.spec, backend=point.backend, python=point.python, model=output)


def _load_all(
    plan: Plan,
    points: Sequence[PeerPoint],
    stack: ExitStack,
    scratch: Path,
    results: Results,
    done: Callable[[str], None],
) -> list[PeerRounds]:
    texts = _write_texts(scratch / "texts.json", plan.workload.texts)
    limit = min(QUICK_SWEEP_TEXTS if plan.quick else FULL_SWEEP_TEXTS, len(plan.workload.texts))
    theirs = []
    for point in points:
        try:
            worker = stack.enter_context(PeerWorker(point.command, scratch / f"{point.file_name}.log"))
            loaded = worker.ask("load", model=str(point.model), backend=point.backend, texts=str(texts))
            done(point.name)
            sweep = tuple(_sweep(worker, _batch_sizes(plan), limit, point.name, done))
        except (PeerError, OSError) as error:
            results.fail("peers", point.name, error)
            continue
        theirs.append(
            PeerRounds(
                point=point,
                worker=worker,
                loaded=loaded,
                sweep=sweep,
                batch_size=min(sweep, key=lambda tried: tried.seconds).batch_size,
                texts=len(plan.workload.texts),
                dim=plan.manifest.encoder.dim,
            )
        )
    return theirs


def _sweep(
    worker: PeerWorker, sizes: Sequence[int], limit: int, name: str, done: Callable[[str], None]
) -> list[SweepPoint]:
    """Try every batch size: one untimed pass (shapes may be compiled), then the better of two."""
    tried = []
    for size in sizes:
        answers = [worker.ask("encode", batch_size=size, limit=limit) for _ in range(3)]
        seconds = min(float(answer["seconds"]) for answer in answers[1:])
        tried.append(SweepPoint(batch_size=size, texts=limit, seconds=seconds))
        done(f"{name}, batch {size}")
    return tried


def _vectors(peer: PeerRounds, scratch: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    file, listed = scratch / "vectors.npy", _write_texts(scratch / "dump.json", texts)
    peer.worker.ask("dump", batch_size=peer.batch_size, output=str(file), texts=str(listed))
    vectors: NDArray[np.float32] = np.load(file)
    expected = (len(texts), peer.dim)
    if vectors.shape != expected or not np.isfinite(vectors).all():
        raise PeerError(f"its vectors have shape {vectors.shape} where {expected} is expected, or are not finite")
    return vectors


def _judge(theirs: Sequence[PeerRounds], judge: Judge, scratch: Path, results: Results, progress: Progress) -> None:
    with steps(progress, "peers: quality", len(theirs)) as done:
        for peer in theirs:
            name = peer.point.name
            try:
                vectors = _vectors(peer, scratch, judge.texts)
                results.quality[name] = judge.result(name, vectors, ours=False)
            except MirrorError as error:
                results.fail("quality", name, error)
            done(name)


def _take_turns(
    plan: Plan, ours: Sequence[Rounds], theirs: Sequence[PeerRounds], results: Results, progress: Progress
) -> None:
    parties: list[Rounds | PeerRounds] = alternate(ours, theirs)
    failed: set[int] = set()
    with steps(progress, "peers: rounds", len(parties) * plan.rounds) as done:
        for _, party in interleave(parties, plan.rounds):
            name = party.point.name if isinstance(party, PeerRounds) else party.runner.point.name
            if id(party) not in failed:
                time.sleep(SETTLE_S)
                try:
                    party.run()
                except MirrorError as error:
                    failed.add(id(party))
                    results.fail("peers", name, error)
                else:
                    _keep(plan, party, results)
            done(name)


def _keep(plan: Plan, party: Rounds | PeerRounds, results: Results) -> None:
    if isinstance(party, PeerRounds):
        results.peers[party.point.name] = party.result()
    else:
        point = party.runner.point
        ceiling = results.ceilings.get((point.engine, point.precision))
        results.ours_beside_peers[point.name] = party.result(plan.flop_per_token, ceiling)


def _compare(
    plan: Plan,
    ours: Sequence[Rounds],
    theirs: Sequence[PeerRounds],
    vectors: Mapping[str, NDArray[np.float32]],
    results: Results,
) -> None:
    for mine in ours:
        for peer in theirs:
            if not mine.samples_s or not peer.samples_s:
                continue  # failed: said so already
            name = mine.runner.point.name
            ratio = ratio_of_medians(peer.samples_s, mine.samples_s, seed=plan.seed)  # seconds: theirs over ours
            similar = cosines(vectors[name], vectors[peer.point.name])
            results.comparisons[name, peer.point.name] = Comparison(
                point=mine.runner.point,
                peer=peer.point.name,
                ratio=ratio.value,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
                min_cosine=float(similar.min()),
                mean_cosine=float(similar.mean()),
            )
