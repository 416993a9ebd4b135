"""Suite `quality`: what each artifact's vectors are worth, by people's scores and beside the bundle's own fp32."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.evalsets import EvaluationSet
from benchmarks.point import Point
from benchmarks.quality_results import QualityResult, QualitySet, SetScore
from benchmarks.ranks import estimate, resample_spearman, spearman
from benchmarks.session import Plan, Results, Runner, steps
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Layout, Precision
from mirror_runtime.errors import EngineError, MirrorError
from mirror_runtime.vectors import components, cosines, unit_rows

NEIGHBOURS = 10
MOST_NEIGHBOUR_TEXTS = 5000
"""Of more texts a seeded sample is searched: the search is quadratic."""

DECIMALS = 6
"""Of cosines: the rest is rounding, and pairs of one text with itself must tie."""

BLOCK = 512

Vectors = NDArray[np.float32]


class Judge:
    """Scored pairs, and how the baseline does on them.

    Args:
        sets: the pairs.
        seed: of the bootstrap, and of the texts whose neighbours are compared.

    Attributes:
        texts: every distinct text: what a party encodes.
    """

    def __init__(self, sets: Sequence[EvaluationSet], *, seed: int) -> None:
        self.sets = tuple(sets)
        self.texts = tuple(dict.fromkeys(text for one in sets for text in (*one.first, *one.second)))
        self._rows = {text: row for row, text in enumerate(self.texts)}
        self._seed = seed
        count = min(len(self.texts), MOST_NEIGHBOUR_TEXTS)
        self._searched = np.sort(np.random.default_rng(seed).permutation(len(self.texts))[:count])
        self._baseline: QualityResult | None = None
        self._neighbours: NDArray[np.int64] | None = None

    def describe(self) -> tuple[QualitySet, ...]:
        """Give what a report keeps of the sets."""
        return tuple(
            QualitySet(name=one.name, group=one.group, sha256=one.sha256, scores=one.scores) for one in self.sets
        )

    def take_baseline(self, party: str, vectors: Vectors) -> None:
        """Compare all that follow with these vectors.

        Raises:
            EngineError: see `result`.
        """
        self._baseline = self.result(party, vectors, ours=True)
        self._neighbours = self._nearest(vectors)

    def result(self, party: str, vectors: Vectors, *, ours: bool) -> QualityResult:
        """Judge a party by its vectors of `texts`, float32 [texts, dim].

        Raises:
            EngineError: the vectors are not finite, or tell no pair of a set from another.
        """
        if not np.isfinite(vectors).all():
            raise EngineError("its vectors are not finite")
        base = self._baseline
        scores, draws, deltas = [], [], []
        for at, one in enumerate(self.sets):
            cosines = self._cosines(one, vectors)
            value = 100 * spearman(cosines, one.scores)
            if np.isnan(value):
                raise EngineError(f"every pair of {one.name} has the same cosine: the vectors tell no texts apart")
            drawn = 100 * resample_spearman(cosines, one.scores, seed=(self._seed, at))
            delta = None
            if base is not None and base.party != party:
                before = base.scores[at]
                beside = drawn - 100 * resample_spearman(before.cosines, one.scores, seed=(self._seed, at))
                deltas.append(beside)
                delta = estimate(value - before.spearman.value, beside)
            draws.append(drawn)
            scores.append(
                SetScore(
                    name=one.name, cosines=tuple(cosines) if ours else (), spearman=estimate(value, drawn), delta=delta
                )
            )
        mean = float(np.mean([score.spearman.value for score in scores]))
        return QualityResult(
            party=party,
            ours=ours,
            baseline=None if base is None else base.party,
            scores=tuple(scores),
            mean=estimate(mean, np.mean(draws, axis=0)),
            mean_delta=None
            if base is None or not deltas
            else estimate(mean - base.mean.value, np.mean(deltas, axis=0)),
            top10_overlap=self._overlap(vectors),
            texts=len(self._searched),
        )

    def _cosines(self, one: EvaluationSet, vectors: Vectors) -> list[float]:
        left, right = (vectors[[self._rows[text] for text in side]] for side in (one.first, one.second))
        found: list[float] = cosines(left, right).round(DECIMALS).tolist()
        return found

    def _overlap(self, vectors: Vectors) -> float | None:
        if self._neighbours is None or not self._neighbours.size:
            return None
        found = self._nearest(vectors)
        shared = [len(np.intersect1d(a, b)) for a, b in zip(found, self._neighbours, strict=True)]
        return float(np.mean(shared) / self._neighbours.shape[1])

    def _nearest(self, vectors: Vectors) -> NDArray[np.int64]:
        """Give the nearest other texts of each searched text, [searched, at most NEIGHBOURS], in no order."""
        units = unit_rows(vectors[self._searched].astype(np.float64)).astype(np.float32)
        count = min(NEIGHBOURS, len(units) - 1)
        parts = []
        for start in range(0, len(units), BLOCK):
            similar = units[start : start + BLOCK] @ units.T
            rows = np.arange(len(similar))
            similar[rows, start + rows] = -np.inf  # a text is no neighbour of its own
            parts.append(np.argpartition(-similar, count - 1, axis=1)[:, :count])
        return np.concatenate(parts)


def run_quality(plan: Plan, runners: Sequence[Runner], judge: Judge, results: Results, progress: Progress) -> None:
    """Judge every runner, the baseline first. A run that continues judges anew: peers need the baseline too."""
    results.quality_sets = judge.describe()
    with ExitStack() as stack, steps(progress, "quality", len(runners) + 1) as done:
        baseline = _baseline(plan, runners, stack, results)
        vectors: dict[str, Vectors] = {}
        if baseline is not None:
            done(f"{baseline.point.name}, the baseline")
            name = baseline.point.name
            try:
                vectors[name] = encode_components(plan, baseline, judge.texts)
                judge.take_baseline(name, vectors[name])
            except MirrorError as error:
                results.fail("quality", f"baseline {name}", error)
        for runner in runners:
            name = runner.point.name
            try:
                if name not in vectors:
                    vectors[name] = encode_components(plan, runner, judge.texts)
                results.quality[name] = judge.result(name, vectors[name], ours=True)
            except MirrorError as error:
                results.fail("quality", name, error)
            done(name)
    results.finish("quality")


def encode_components(plan: Plan, runner: Runner, texts: Sequence[str]) -> Vectors:
    """Encode texts and give the components that the vectors stand for, float32 [texts, dim].

    Raises:
        MirrorError: a text or the engine failed.
    """
    return components(runner.encoder.encode(texts), plan.manifest.encoder)


def _baseline(plan: Plan, runners: Sequence[Runner], stack: ExitStack, results: Results) -> Runner | None:
    """Give the bundle's fp32 on ONNX Runtime, or else on what runs it, loaded if it is not measured anyway."""
    packed = [
        artifact
        for artifact in plan.manifest.artifacts
        if artifact.layout is Layout.PACKED and artifact.precision is Precision.FP32
    ]
    packed.sort(key=lambda artifact: artifact.engine is not EngineName.ONNXRUNTIME)
    loaded = {(runner.point.engine, runner.point.precision): runner for runner in runners}
    for artifact in packed:
        if runner := loaded.get((artifact.engine, artifact.precision)):
            return runner
    for artifact in packed:
        point = Point(
            engine=artifact.engine, precision=artifact.precision, artifact=artifact.path, parity=artifact.parity
        )
        try:
            encoder = Encoder.load(plan.bundle, engine=point.engine.value, precision=point.precision.value)
        except MirrorError as error:
            results.fail("quality", f"baseline {point.name}", error)
            continue
        return Runner(point=point, encoder=stack.enter_context(encoder))
    if not packed:
        results.fail("quality", "baseline", "the bundle has no fp32 artifact to compare with")
    return None
