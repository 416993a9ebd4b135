"""Hybrid scores: the base's cosines and words on one scale, batches of alike texts, and the loss over them."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.retrieval import WordScores
from mirror_runtime.errors import InputError
from tests.support.tuning import ANIMALS, load, tune, weights
from training.augment import Document
from training.checkpoint import Checkpoint, Step
from training.documents import View
from training.hybrid import LEXICAL, HybridScores
from training.objective import match_scores
from training.recipe import RECIPES, Objective, Recipe, TuneConfig

pytestmark = pytest.mark.tunes

DOCUMENTS = [
    Document(f"title {i} {line}", f"{line} by a river {i % 5} {'mat ' * (i % 3)}") for i, line in enumerate(ANIMALS)
]
CONFIG = dataclasses.replace(RECIPES[Recipe.HYBRID], batch_size=8, max_tokens=48, lr=1e-3)


@pytest.fixture
def scores(tiny_bert: Path) -> HybridScores:
    return HybridScores(load(tiny_bert), DOCUMENTS, 48)


def test_scores_are_the_mean_of_both_scales_whatever_the_batch(tiny_bert: Path, scores: HybridScores) -> None:
    vectors = [load(tiny_bert, normalize=True).encode([one[part] for one in DOCUMENTS]) for part in (0, 1)]
    cosines = vectors[0] @ vectors[1].T
    every = np.arange(len(DOCUMENTS))
    words = WordScores([one.text for one in DOCUMENTS], [one.title for one in DOCUMENTS]).scores(every, every)
    scaled = [(one - one.mean(1, keepdims=True)) / one.std(1, keepdims=True) for one in (cosines, words)]
    expected = ((1 - LEXICAL) * scaled[0] + LEXICAL * scaled[1]) * cosines.std(1).mean()
    np.testing.assert_allclose(scores[every.tolist()].numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(scores[[5, 2]].numpy(), expected[np.ix_([5, 2], [5, 2])], atol=1e-4)


def test_a_word_of_few_texts_gives_no_outlier_and_chunks_change_nothing(tiny_bert: Path, monkeypatch: Any) -> None:
    documents = [*DOCUMENTS, Document("zzyzx", "a zzyzx by the river"), Document("unheard", "a mat by the river")]
    every = list(range(len(documents)))
    whole = HybridScores(load(tiny_bert), documents, 48)[every]
    assert whole.abs().max() < 10  # a deviation of 0 would give 1e7
    monkeypatch.setattr("training.hybrid.CHUNK", 100)
    torch.testing.assert_close(HybridScores(load(tiny_bert), documents, 48)[every], whole, atol=1e-5, rtol=1e-4)


def test_a_batch_holds_alike_texts_and_every_text_once(scores: HybridScores) -> None:
    order = scores.order(8, random.Random(1))
    assert sorted(order) == list(range(len(DOCUMENTS)))
    assert order != scores.order(8, random.Random(2))
    texts = scores._texts
    alike = [(texts[order[i : i + 8]] @ texts[order[i : i + 8]].T).mean() for i in range(0, 32, 8)]
    assert np.mean(1 - np.array(alike)) < 0.7 * (1 - texts @ texts.T).mean()  # the tiny encoder's vectors are close
    assert len(scores.order(9, random.Random(1))) == 27


def test_the_loss_is_the_divergence_of_rankings() -> None:
    first, second, target = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=2)
    assert match_scores(first, second, cosines, 0.1).item() == pytest.approx(0, abs=1e-6)
    scores = target @ target.T
    p, q = (scores / 0.1).softmax(1), (cosines / 0.1).softmax(1)
    assert match_scores(first, second, scores, 0.1).item() == pytest.approx(
        ((p * (p / q).log()).sum() / 6).item(), 1e-4
    )


def test_an_encoder_learns_the_ranking_and_resumes_exactly(tiny_bert: Path, scores: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=8, dropout=0.0)
    whole, steps = tune(tiny_bert, DOCUMENTS, config, targets=scores)
    losses = [step.loss for step in steps]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    checkpoint = Checkpoint(path=tmp_path / "state", every=2)

    def stop(step: Step) -> None:
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tiny_bert, DOCUMENTS, config, targets=scores, checkpoint=checkpoint, on_step=stop)
    resumed, _ = tune(tiny_bert, DOCUMENTS, config, targets=scores, checkpoint=checkpoint)
    assert torch.equal(weights(resumed), weights(whole))


def test_what_it_cannot_learn_from_is_one_error(tiny_bert: Path) -> None:
    with pytest.raises(InputError, match="--objective hybrid learns from titles and texts: pass --documents"):
        tune(tiny_bert, ANIMALS, CONFIG)
    with pytest.raises(InputError, match="leave --views out"):
        TuneConfig(objective=Objective.HYBRID, views=(View.SAME,))
