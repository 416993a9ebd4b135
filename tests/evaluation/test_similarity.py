"""An encoder's vectors against human scores."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from evaluation.sets import EvaluationSet, read_sets
from evaluation.similarity import Group, Report, difference, evaluate
from evaluation.statistics import Bootstrap
from evaluation.vectors import Encode
from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import BundleError, InputError
from tests.support.fake_bundles import encoder_spec

WORDS = ["the cat", "a dog", "cat dog", "a man is playing a guitar", "the river", "playing", "mat", "on the mat", "man"]
VECTORS = np.random.default_rng(0).normal(1, 1, size=(len(WORDS), 8)).astype(np.float32)
MOVED = VECTORS + np.random.default_rng(1).normal(scale=0.1, size=VECTORS.shape).astype(np.float32)

SPEC = encoder_spec()


def encoder(vectors: NDArray[np.float32]) -> Encode:
    return lambda texts: vectors[[WORDS.index(text) for text in texts]]


def measure(vectors: NDArray[np.float32] = VECTORS, sets: object = None, seed: int = 0) -> Report:
    return evaluate(encoder(vectors), sets or SETS, spec=SPEC, bootstrap=Bootstrap(seed=seed))  # type: ignore[arg-type]


def some_set(name: str, seed: int) -> EvaluationSet:
    rng = np.random.default_rng(seed)
    first, second = (tuple(WORDS[i] for i in rng.integers(len(WORDS), size=40)) for _ in range(2))
    scores = rng.integers(6, size=40).astype(float)
    return EvaluationSet(name=name, first=first, second=second, scores=scores, sha256=name)


SETS = {Group.STS: [some_set("one", 1), some_set("two", 2)], Group.WORDS: [some_set("three", 3)]}


def test_measures_follow_from_the_vectors() -> None:
    report = measure()
    units = VECTORS.astype(np.float64) / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    for one, result in zip([*SETS[Group.STS], *SETS[Group.WORDS]], report.results, strict=True):
        first, second = (np.stack([units[WORDS.index(text)] for text in side]) for side in (one.first, one.second))
        cosines = (first * second).sum(axis=1).round(6)  # equal pairs must tie
        assert result.spearman.value == pytest.approx(100 * stats.spearmanr(cosines, one.scores).statistic, abs=1e-6)
        assert result.spearman.low < result.spearman.value < result.spearman.high
        close = one.scores >= 0.8 * one.scores.max()
        assert result.close_pairs == close.sum() > 0
        assert result.alignment == pytest.approx(((first - second)[close] ** 2).sum(axis=1).mean(), abs=1e-5)
        texts = list(dict.fromkeys(one.texts))
        assert result.mean_norm == pytest.approx(np.linalg.norm(encoder(VECTORS)(texts).mean(axis=0)), rel=1e-4)
    values = [result.spearman.value for result in report.results]
    assert report.means[Group.STS].value == pytest.approx(sum(values[:2]) / 2)
    assert report.means[Group.WORDS].value == values[2]
    assert report.to_json()["mean"] == pytest.approx(sum(values) / 3)
    width = report.means[Group.STS].high - report.means[Group.STS].low
    assert width < report.results[0].spearman.high - report.results[0].spearman.low


def test_the_same_seed_has_the_same_report_and_another_has_other_intervals() -> None:
    first, again, other = (measure(seed=seed) for seed in (0, 0, 1))
    assert first.to_json() == again.to_json()
    assert first.results[0].spearman.value == other.results[0].spearman.value
    assert first.results[0].spearman.low != other.results[0].spearman.low


def test_texts_are_encoded_once_and_progress_ends_at_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.vectors.TEXTS_A_CALL", 4)
    encoded: list[str] = []
    progress: list[tuple[int, int]] = []

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        encoded.extend(texts)
        return encoder(VECTORS)(texts)

    evaluate(encode, SETS, spec=SPEC, on_progress=lambda done, total: progress.append((done, total)))
    assert sorted(encoded) == sorted(WORDS)
    assert progress == [(0, 9), (4, 9), (8, 9), (9, 9)]


def test_differences_are_paired() -> None:
    before, after = measure(VECTORS), measure(MOVED)
    same, change = difference(before, before), difference(before, after)
    assert {(gain.value, gain.low, gain.high) for gain in (*same.sets, *same.means.values())} == {(0, 0, 0)}
    for old, new, gain in zip(before.results, after.results, change.sets, strict=True):
        assert gain.value == pytest.approx(new.spearman.value - old.spearman.value)
        assert gain.low <= gain.value <= gain.high
        assert gain.high - gain.low < new.spearman.high - new.spearman.low
    assert change.means[Group.STS].value == pytest.approx(sum(gain.value for gain in change.sets[:2]) / 2)
    with pytest.raises(ValueError, match="different sets or seeds"):
        difference(before, measure(seed=1))


def test_unusable_sets_and_vectors_are_clear_errors() -> None:
    same = dataclasses.replace(SETS[Group.STS][0], first=("the cat",) * 40, second=("the cat",) * 40)
    with pytest.raises(InputError, match="every pair of one has the cosine"):
        measure(sets={Group.STS: [same]})
    with pytest.raises(BundleError, match="encoder returns vectors that are not finite"):
        measure(np.full_like(VECTORS, np.nan))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("pooling", "group", "name", "expected"),
    [(Pooling.CLS, Group.STS, "sts/stsb-test.tsv", 84.57), (Pooling.MEAN, Group.WORDS, "wordsim/rg-65.txt", 57.39)],
)
def test_correlations_measured_without_this_code_are_reproduced(shared, tmp_path, pooling, group, name, expected):
    """Of models/minilm-mlm on 300 pairs, one text at a time, with transformers and scipy alone (2026-11-30)."""
    from encoders.reference import Reference
    from encoders.source import resolve

    with (shared / "data" / name).open(encoding="utf-8") as file:
        some = tmp_path / Path(name).name
        some.write_text("".join(itertools.islice(file, 301)), encoding="utf-8")
    reference = Reference.load(resolve(str(shared / "models" / "minilm-mlm"), pooling=pooling))
    report = evaluate(reference.encode_unnormalized, {group: read_sets(str(some))}, spec=reference.spec)
    assert report.results[0].spearman.value == pytest.approx(expected, abs=0.03)
