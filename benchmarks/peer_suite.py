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

from benchmarks.peers.worker import PeerWorker, peer_environment
from benchmarks.results import Comparison, PeerResult, SweepPoint
from benchmarks.session import Plan, Results, Runner, steps
from benchmarks.startup import READY, Starter
from benchmarks.summary import alternate, interleave, median, ratio_of_medians
from benchmarks.throughput import Rounds
from mirror_runtime.environments import existing_environment, make_environment
from mirror_runtime.errors import MirrorError, PeerError

BATCH_SIZES = (8, 16, 32, 64, 128)
FULL_SWEEP_TEXTS = 1024
QUICK_SWEEP_TEXTS = 256
SETTLE_S = 0.25
"""Pause between parties: a library's threads may go on spinning for a while after its last call."""

FOLDER = Path(__file__).resolve().parent / "peers"

_STARTUP = f"""
import sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], backend=sys.argv[2], device="cpu", local_files_only=True)
assert model.encode(["How long does the first vector take?"]).shape[0] == 1
sys.stdout.write("{READY}\\n")
sys.stdout.flush()
"""


@dataclass(frozen=True, kw_only=True)
class PeerSpec:
    """A peer as data: adding one needs a requirements file, a script that speaks the protocol, and a line here.

    Attributes:
        name: of its environment, its requirements file and its script.
        title: as its makers write it.
        exports: which backends need files that the bundle may lack, and the file that shows they are there.
    """

    name: str
    title: str
    backends: tuple[str, ...]
    exports: Mapping[str, str]
    startup: str


PEERS = (
    PeerSpec(
        name="sentence_transformers",
        title="sentence-transformers",
        backends=("torch", "onnx", "openvino"),
        exports={"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"},
        startup=_STARTUP,
    ),
)


@dataclass(frozen=True, kw_only=True)
class PeerPoint:
    """One backend of an installed peer, ready to load.

    Attributes:
        model: the bundle, or a copy that holds the files the backend needs.
    """

    spec: PeerSpec
    backend: str
    python: Path
    model: Path

    @property
    def name(self) -> str:
        """Peer and backend."""
        return f"{self.spec.title} {self.backend}"

    @property
    def command(self) -> tuple[str, ...]:
        """What starts the worker. Isolated mode keeps our folder and the user's packages out of its imports."""
        return str(self.python), "-I", str(FOLDER / f"{self.spec.name}_peer.py")

    @property
    def starter(self) -> Starter:
        """What the suite `startup` runs."""
        return Starter(
            party=self.name,
            min_cosine=None,
            command=(str(self.python), "-I", "-c", self.spec.startup, str(self.model), self.backend),
            environment=peer_environment(),
        )


@dataclass(kw_only=True)
class PeerRounds:
    """The rounds of one loaded peer at its best batch size."""

    point: PeerPoint
    worker: PeerWorker
    loaded: Mapping[str, Any]
    sweep: tuple[SweepPoint, ...]
    batch_size: int
    texts: int
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
    """Install every peer that is not given, and export what its backends need. What fails is noted and left out.

    Args:
        plan: what is measured.
        given: environments that the caller made, by the peer's name.
        environments: where to make the others.
        scratch: for converted models; the bundle is never written to.
        results: where failures are noted.
        progress: for the bar.
    """
    points: list[PeerPoint] = []
    with steps(progress, "prepare peers", sum(1 + len(spec.backends) for spec in PEERS)) as done:
        for spec in PEERS:
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
                    points.append(_exported(point, scratch))
                except PeerError as error:
                    results.fail("peers", point.name, error)
    return points


def run_peers(
    plan: Plan, runners: Sequence[Runner], points: Sequence[PeerPoint], results: Results, progress: Progress
) -> None:
    """Find each peer's best batch size, then let ours and theirs take turns, then compare vectors."""
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder:
        scratch = Path(folder)
        ours = [Rounds(runner=runner, texts=plan.workload.texts) for runner in runners]
        with steps(progress, "peers: load and sweep", len(points) * (1 + len(BATCH_SIZES))) as done:
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
                    vectors[peer.point.name] = _vectors(peer, scratch / "vectors.npy", plan)
                except PeerError as error:
                    theirs.remove(peer)
                    results.fail("peers", peer.point.name, error)
                done(peer.point.name)
        _take_turns(plan, ours, theirs, results, progress)
        _compare(plan, ours, theirs, vectors, results)


def _python(spec: PeerSpec, given: Mapping[str, Path], environments: Path, say: Callable[[str], None]) -> Path:
    if spec.name in given:
        return existing_environment(given[spec.name].absolute())
    return make_environment(FOLDER / f"{spec.name}.txt", environments.absolute() / spec.name, say)


def _exported(point: PeerPoint, scratch: Path) -> PeerPoint:
    """Give the point a copy of the model with its backend's files, if the bundle has none of them."""
    needed = point.spec.exports.get(point.backend)
    if needed is None or (point.model / needed).is_file():
        return point
    output = scratch / f"{point.spec.name}-{point.backend}"
    with PeerWorker(point.command, scratch / "export.log") as worker:
        worker.ask("export", model=str(point.model), backend=point.backend, output=str(output))
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
    texts = scratch / "texts.json"  # JSON, for a text may hold any character
    texts.write_text(json.dumps(plan.workload.texts), encoding="utf-8")
    limit = min(QUICK_SWEEP_TEXTS if plan.quick else FULL_SWEEP_TEXTS, len(plan.workload.texts))
    theirs = []
    for point in points:
        try:
            worker = stack.enter_context(PeerWorker(point.command, scratch / f"{point.backend}.log"))
            loaded = worker.ask("load", model=str(point.model), backend=point.backend, texts=str(texts))
            done(point.name)
            sweep = tuple(_sweep(worker, limit, point.name, done))
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
            )
        )
    return theirs


def _sweep(worker: PeerWorker, limit: int, name: str, done: Callable[[str], None]) -> list[SweepPoint]:
    """Try every batch size: one untimed pass (shapes may be compiled), then the better of two."""
    tried = []
    for size in BATCH_SIZES:
        answers = [worker.ask("encode", batch_size=size, limit=limit) for _ in range(3)]
        seconds = min(float(answer["seconds"]) for answer in answers[1:])
        tried.append(SweepPoint(batch_size=size, texts=limit, seconds=seconds))
        done(f"{name}, batch {size}")
    return tried


def _vectors(peer: PeerRounds, file: Path, plan: Plan) -> NDArray[np.float32]:
    peer.worker.ask("dump", batch_size=peer.batch_size, output=str(file))
    vectors: NDArray[np.float32] = np.load(file)
    expected = (len(plan.workload.texts), plan.manifest.encoder.dim)
    if vectors.shape != expected or not np.isfinite(vectors).all():
        raise PeerError(f"its vectors have shape {vectors.shape} where {expected} is expected, or are not finite")
    return vectors


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
            cosines = cosine(vectors[name], vectors[peer.point.name])
            results.comparisons[name, peer.point.name] = Comparison(
                point=mine.runner.point,
                peer=peer.point.name,
                ratio=ratio.value,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
                min_cosine=float(cosines.min()),
                mean_cosine=float(cosines.mean()),
            )


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute the cosine similarity of each row of two arrays [n, dim], as float64 [n]; 0 where a row is zeros."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    products = np.einsum("nd,nd->n", x, y)
    cosines: NDArray[np.float64] = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return cosines
