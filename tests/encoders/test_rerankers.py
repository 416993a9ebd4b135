"""Cross-encoders are found by their architecture; their scores are those of transformers and sentence-transformers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder

from encoders.reference import Reference
from encoders.rerankers import SCORE_HEADS
from encoders.source import resolve
from encoders.write import write_layout
from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import BundleError
from tests.support.tiny_encoders import write_tiny_encoder

PAIRS = [
    ("how warm is it", "the house is warm"),
    ("", "a man plays"),
    ("[SEP] is a word", "and [CLS] too"),
    ("short", "a long text " * 40),
    ("a long query " * 40, "a long text " * 40),
]


@pytest.mark.parametrize("family", SCORE_HEADS)
def test_scores_are_those_of_transformers_own_classifier(family, tmp_path):
    write_tiny_encoder(family, tmp_path / "published", labels=1)
    source = resolve(str(tmp_path / "published"), text_vectors=False)
    reference = Reference.load(source)
    found = reference.encode(PAIRS)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "published").eval()
    for pair, score in zip(PAIRS, found, strict=True):
        inputs = reference.tokenizer(*pair, truncation=True, max_length=source.spec.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            np.testing.assert_allclose(score, model(**inputs).logits.numpy()[0], atol=1e-5)
    assert np.ptp(found) > 0.01


def test_a_written_folder_is_the_same_cross_encoder_to_us_and_to_sentence_transformers(tmp_path):
    write_tiny_encoder("bert", tmp_path / "published", labels=1)
    reference = Reference.load(resolve(str(tmp_path / "published"), text_vectors=False))
    write_layout(
        tmp_path / "written",
        model=reference.model,
        tokenizer=reference.tokenizer,
        spec=reference.spec,
        dense=reference.dense,
        card="",
    )
    assert json.loads((tmp_path / "written" / "encoder.json").read_text())["pooling"] == "rerank"
    again = Reference.load(resolve(str(tmp_path / "written"), text_vectors=False))
    assert np.array_equal(again.encode(PAIRS), reference.encode(PAIRS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = CrossEncoder(str(tmp_path / "written"), device="cpu")
    logits = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(logits, again.encode(PAIRS)[:, 0], atol=1e-5)


def test_what_is_not_a_cross_encoder_is_named(tiny_bert: Path, tmp_path):
    write_tiny_encoder("bert", tmp_path / "two", labels=2)
    write_tiny_encoder("bert", tmp_path / "one", labels=1)
    for folder, problem in ((tmp_path / "two", "a classifier of 2 labels"), (tiny_bert, "is not a cross-encoder")):
        with pytest.raises(BundleError, match=problem):
            resolve(str(folder), pooling=Pooling.RERANK, text_vectors=False)
    with pytest.raises(BundleError, match="cross-encoder, which has no vectors"):
        resolve(str(tmp_path / "one"))
    assert resolve(str(tmp_path / "one"), pooling=Pooling.MEAN).spec.dim == 32
