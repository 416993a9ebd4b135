"""An encoder against people's scores."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from encoders.reference import Reference
from encoders.source import resolve
from evaluation.sets import EvaluationSet, read_sets
from evaluation.similarity import Group, Report, difference, evaluate
from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import BundleError, InputError

WORDS = ["the cat", "a dog", "cat dog", "a man is playing a guitar", "the river", "playing", "mat", "on the mat", "man"]


def some_set(name: str, seed: int) -> EvaluationSet:
    rng = np.random.default_rng(seed)
    sides = [tuple(WORDS[i] for i in rng.integers(len(WORDS), size=40)) for _ in range(2)]
    return EvaluationSet(
        name=name, first=sides[0], second=sides[1], scores=rng.integers(6, size=40).astype(float), sha256=name
    )


SETS = {Group.STS: [some_set("one", 1), some_set("two", 2)], Group.WORDS: [some_set("three", 3)]}


@pytest.fixture
def reference(tiny_bert: Path) -> Reference:
    return Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN, normalize=True))


def test_figures_are_those_of_the_plain_vectors(reference: Reference) -> None:
    report = evaluate(reference, SETS, name="x")
    for one, result in zip([*SETS[Group.STS], *SETS[Group.WORDS]], report.results, strict=True):
        vectors = dict(zip(WORDS, reference.encode(WORDS).astype(np.float64), strict=True))  # equal pairs must tie
        first, second = (np.stack([vectors[text] for text in side]) for side in (one.first, one.second))
        cosines = (first * second).sum(axis=1).round(6)
        assert result.spearman.value == pytest.approx(100 * stats.spearmanr(cosines, one.scores).statistic, abs=1e-6)
        assert result.spearman.low < result.spearman.value < result.spearman.high
        close = one.scores >= 0.8 * one.scores.max()
        assert result.close_pairs == close.sum() > 0
        assert result.alignment == pytest.approx(((first - second)[close] ** 2).sum(axis=1).mean(), abs=1e-5)
        raw = dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, normalize=False))
        assert result.mean_norm == pytest.approx(
            np.linalg.norm(raw.encode(list(dict.fromkeys(one.texts))).mean(axis=0)), rel=1e-4
        )
    values = [result.spearman.value for result in report.results]
    assert report.means[Group.STS].value == pytest.approx(sum(values[:2]) / 2)
    assert report.means[Group.WORDS].value == values[2]
    assert report.to_json()["mean"] == pytest.approx(sum(values) / 3)
    width = report.means[Group.STS].high - report.means[Group.STS].low
    assert width < report.results[0].spearman.high - report.results[0].spearman.low


def test_one_seed_gives_the_same_report_and_another_other_intervals(reference: Reference) -> None:
    first, again, other = (evaluate(reference, SETS, seed=seed) for seed in (0, 0, 1))
    assert first.to_json() == again.to_json()
    assert first.results[0].spearman.value == other.results[0].spearman.value
    assert first.results[0].spearman.low != other.results[0].spearman.low


def test_texts_are_encoded_once_and_progress_ends_at_all(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.similarity.TEXTS_A_CALL", 4)
    seen: list[tuple[int, int]] = []
    evaluate(reference, SETS, on_texts=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 9), (4, 9), (8, 9), (9, 9)]


def tuned(reference: Reference) -> Reference:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return reference


def test_differences_are_paired(reference: Reference) -> None:
    before = evaluate(reference, SETS)
    after = evaluate(tuned(reference), SETS)
    same, change = difference(before, before), difference(before, after)
    assert {(gain.value, gain.low, gain.high) for gain in (*same.sets, *same.means.values())} == {(0, 0, 0)}
    for old, new, gain in zip(before.results, after.results, change.sets, strict=True):
        assert gain.value == pytest.approx(new.spearman.value - old.spearman.value)
        assert gain.low <= gain.value <= gain.high
        assert gain.high - gain.low < new.spearman.high - new.spearman.low
    assert change.means[Group.STS].value == pytest.approx(sum(gain.value for gain in change.sets[:2]) / 2)
    with pytest.raises(ValueError, match="different sets or seeds"):
        difference(before, evaluate(reference, SETS, seed=1))


def test_what_cannot_be_measured_is_a_clear_error(reference: Reference) -> None:
    with pytest.raises(InputError, match="nothing to evaluate on"):
        evaluate(reference, {Group.STS: []})
    same = dataclasses.replace(SETS[Group.STS][0], first=("the cat",) * 40, second=("the cat",) * 40)
    with pytest.raises(InputError, match="every pair of one has the cosine"):
        evaluate(reference, {Group.STS: [same]})
    with torch.no_grad():
        next(reference.model.parameters()).fill_(float("nan"))
    with pytest.raises(BundleError, match="encoder gives vectors that are not finite"):
        evaluate(reference, SETS)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "stsb", "rg"), [(Pooling.MEAN, 59.60, 57.39), (Pooling.CLS, 70.40, 48.51)])
def test_the_untuned_models_published_figures_are_found_again(
    shared: Path, pooling: Pooling, stsb: float, rg: float
) -> None:
    """STS-B test of models/minilm-mlm: 59.6 (mean) and 70.4 ([CLS]), measured independently of this code."""
    reference = Reference.load(resolve(str(shared / "models" / "minilm-mlm"), pooling=pooling))
    data = shared / "data"
    report: Report = evaluate(
        reference,
        {
            Group.STS: read_sets(str(data / "sts" / "stsb-test.tsv")),
            Group.WORDS: read_sets(str(data / "wordsim" / "rg-65.txt")),
        },
    )
    assert [round(result.spearman.value, 2) for result in report.results] == pytest.approx([stsb, rg], abs=0.03)
