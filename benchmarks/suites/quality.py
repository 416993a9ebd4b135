"""Suite `quality`: what each party's vectors are worth, by people's scores and beside the bundle's own fp32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.agreement import Components, encode_components, fp32_reference
from benchmarks.plan import Plan, Suite, loaded, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import PEOPLE, Better
from evaluation.sets import EvaluationSet, read_sets
from evaluation.statistics import estimate, resample_spearman, spearman
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.vectors import cosines, unit_rows

SUITE = Suite.QUALITY.value
QUICK_PAIRS = 250

NEIGHBOURS = 10
MOST_NEIGHBOUR_TEXTS = 5000
"""Of more texts a seeded sample is searched: the search is quadratic."""

RESAMPLES = 1000

DECIMALS = 6
"""Of cosines: the rest is rounding, and pairs of one text with itself must tie."""

MEAN = "mean"


def read_evaluation_sets(
    sts: Sequence[Path], words: Sequence[Path], *, quick: bool = False
) -> tuple[EvaluationSet, ...]:
    """Read sets of sentence and of word similarity; a quick run takes the same sample of each.

    The size of a sample is in the set's name.

    Raises:
        InputError: there are none, one cannot be read, or two have one name.
    """
    sets = [one for path in (*sts, *words) for one in read_sets(str(path))]
    if not sets:
        raise InputError("suite quality needs --sts or --words: scored pairs to judge vectors by")
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise InputError(f"two evaluation sets have one name: {', '.join(sorted(names))}")
    return tuple(_sample(one) if quick and len(one.scores) > QUICK_PAIRS else one for one in sets)


class Judge:
    """Scored pairs, and the bundle's own fp32 on them: a failure is recorded where it cannot run.

    Attributes:
        texts: every distinct text: what a party encodes.
        baseline: the variant of the bundle's fp32; None where there is none.
    """

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        self.texts = tuple(dict.fromkeys(text for one in plan.sets for text in one.texts))
        self._sets = plan.sets
        self._rows = {text: row for row, text in enumerate(self.texts)}
        self._seed = plan.seed
        self._recorder = recorder
        count = min(len(self.texts), MOST_NEIGHBOUR_TEXTS)
        self._searched = np.sort(np.random.default_rng(plan.seed).permutation(len(self.texts))[:count])
        for one in plan.sets:
            recorder.record(SUITE, PEOPLE, "score", *one.scores, conditions=_conditions(one))
        reference = fp32_reference(plan, "sets", self.texts, recorder, Suite.QUALITY)
        self.baseline = None if reference is None else reference.party
        if reference is not None:
            self._scores = self._judge([self._cosines(one, reference.vectors) for one in plan.sets])
            self._neighbours = self._nearest(reference.vectors)

    def judge(self, party: str, vectors: Components, *, keep_cosines: bool) -> None:
        """Record a party's rank correlations, their differences to fp32's, and the overlap of nearest neighbours.

        The vectors are those of `texts`, float32 [texts, dim]. `compare.py` needs the cosines of pairs.

        Raises:
            EngineError: the vectors are not finite, or every pair of a set has the same cosine.
        """
        if not np.isfinite(vectors).all():
            raise EngineError("its vectors are not finite")
        found = [self._cosines(one, vectors) for one in self._sets]
        scores = self._judge(found)
        fact = partial(self._recorder.record, SUITE, party)
        for one, values, score in zip(self._sets, found, scores[:, 0], strict=True):
            if np.isnan(score):
                raise EngineError(f"every pair of {one.name} has the same cosine: the vectors distinguish no texts")
            if keep_cosines:
                fact("cosine of pairs", *values, conditions=_conditions(one), better=Better.HIGHER)
        metrics = {"Spearman x 100": scores}
        if self.baseline not in (None, party):
            metrics["Spearman x 100, difference to fp32"] = scores - self._scores
        for metric, rows in metrics.items():
            for name, row in zip((*(one.name for one in self._sets), MEAN), (*rows, rows.mean(axis=0)), strict=True):
                interval = estimate(row[0], row[1:])
                figures = {"low": interval.low, "high": interval.high}
                fact(metric, row[0], unit="points", conditions={"set": name}, figures=figures)
        if self.baseline is not None:
            shared = [len(np.intersect1d(a, b)) for a, b in zip(self._nearest(vectors), self._neighbours, strict=True)]
            fact("top-10 overlap with fp32", float(np.mean(shared) / self._neighbours.shape[1]))
        fact("texts searched", len(self._searched))

    def _judge(self, found: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Return 100 times the rank correlation of each set's cosines, [sets, 1 + RESAMPLES], of all pairs first.

        The same pairs are resampled for every party, so that differences are paired.
        """
        rows: list[list[float]] = []
        for at, (one, values) in enumerate(zip(self._sets, found, strict=True)):
            drawn = resample_spearman(values, one.scores, RESAMPLES, np.random.default_rng([self._seed, at]))
            rows.append([spearman(values, one.scores), *drawn])
        scores: NDArray[np.float64] = 100 * np.array(rows, np.float64)
        return scores

    def _cosines(self, one: EvaluationSet, vectors: Components) -> NDArray[np.float64]:
        left, right = (vectors[[self._rows[text] for text in side]] for side in (one.first, one.second))
        found: NDArray[np.float64] = np.asarray(cosines(left, right), np.float64).round(DECIMALS)
        return found

    def _nearest(self, vectors: Components) -> NDArray[np.int64]:
        """Find the nearest other texts of each searched text, [searched, at most NEIGHBOURS], in no order."""
        units = unit_rows(vectors[self._searched])
        similar = units @ units.T
        np.fill_diagonal(similar, -np.inf)  # a text is not its own neighbour
        count = min(NEIGHBOURS, len(units) - 1)
        return np.argpartition(similar, -count, axis=1)[:, -count:]


def run_quality(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Judge every variant."""
    with loaded(plan, recorder, Suite.QUALITY) as runners, steps(progress, SUITE, len(runners) + 1) as done:
        judge = Judge(plan, recorder)
        done(f"reference {judge.baseline}")
        for runner in runners:
            name = runner.variant.name
            with recorder.failing(SUITE, name):
                judge.judge(name, encode_components(plan, runner, judge.texts), keep_cosines=True)
            done(name)


def _conditions(one: EvaluationSet) -> dict[str, str]:
    """Return what names a set: another file of the same name is another set."""
    return {"set": one.name, "sha256": one.sha256[:16]}


def _sample(one: EvaluationSet) -> EvaluationSet:
    at = sorted(random.Random(0).sample(range(len(one.scores)), QUICK_PAIRS))
    first, second = (tuple(side[i] for i in at) for side in (one.first, one.second))
    return replace(one, name=f"{one.name}, {QUICK_PAIRS} pairs", first=first, second=second, scores=one.scores[at])
