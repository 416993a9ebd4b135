"""Vectors of tokens: whose they are, what characters they stand for, and who has none."""

import asyncio

import numpy as np
import pytest
from transformers import AutoTokenizer

from mirror_runtime import AsyncEncoder, Encoder, InputError, TextError
from mirror_runtime.bundle import Pooling
from mirror_runtime.corpus.corpus import open_corpus
from mirror_runtime.corpus.encode_file import encode_file
from mirror_runtime.errors import NotFiniteError
from mirror_runtime.triton import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from tests.support.fake_bundles import write_fake_bundle

TEXTS = ["Delete a folder!", "", "unbelievably  río 😀", "the cat " * 60, "a  b", "A b", *(f"w {i}" for i in range(90))]


@pytest.fixture
def encoder(tokens_bundle):
    with Encoder.load(tokens_bundle, engine="fake") as encoder:
        yield encoder


def test_each_token_has_its_vector_whatever_else_is_encoded_and_its_characters(encoder, minilm):
    peer = AutoTokenizer.from_pretrained(minilm)
    together = encoder.encode_tokens(iter(TEXTS))
    assert encoder.stats.executions < len(TEXTS) / 4
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = encoder.encode_tokens([text])
        assert np.array_equal(found.vectors, alone.vectors)
        assert np.array_equal(found.offsets, alone.offsets)
        theirs = peer(text, truncation=True, max_length=64, return_offsets_mapping=True)
        assert found.offsets.tolist() == [list(pair) for pair in theirs["offset_mapping"]]
        assert found.vectors.shape == (len(theirs["input_ids"]), 8)
    assert len(np.unique(together[0].vectors, axis=0)) == len(together[0].vectors)  # not one vector many times
    assert encoder.encode_tokens([]) == []


@pytest.mark.parametrize("template", [None, "passage: {text} end"])
def test_offsets_count_from_the_callers_text_and_chunks_cover_it(minilm, tmp_path, template):
    bundle = write_fake_bundle(minilm, tmp_path / "b", pooling=Pooling.TOKENS, max_tokens=16, template=template)
    text = "alpha beta gamma delta " * 8
    with Encoder.load(bundle, engine="fake", long_texts="chunk") as encoder:
        encoder.prompts = {"query": "ask: "}
        (plain,) = encoder.encode_tokens([text])
        words = [text[begin:end] for begin, end in plain.offsets if end]
        assert words == text.split()
        if template is None:
            (asked,) = encoder.encode_tokens([text], prompt_name="query")
            assert [text[begin:end] for begin, end in asked.offsets if end] == text.split()
            assert len(asked.offsets) > len(plain.offsets)
        assert len(plain.vectors) == len(plain.offsets) >= 32 + 3 * 2  # special tokens of three chunks


def test_a_bad_text_is_named_and_the_others_keep_their_own(encoder):
    texts = [TEXTS[0], 5, TEXTS[2]]
    encoded = encoder.encode_detailed(texts)
    assert encoded.counts.tolist() == [7, 0, len(encoded.by_text()[2])]
    assert np.array_equal(encoded.by_text()[2], encoder.encode_tokens([TEXTS[2]])[0].vectors)
    with pytest.raises(TextError, match="text 1"):
        encoder.encode_tokens(texts)

    async def share():
        async with AsyncEncoder(encoder) as shared:
            with pytest.raises(InputError, match="encode_tokens"):
                await shared.encode(["a"])
            return await asyncio.gather(shared.encode_detailed(texts), shared.encode_detailed(texts[::-1]))

    one, other = asyncio.run(share())
    for found, expected in zip(one.by_text(), encoded.by_text(), strict=True):
        assert np.array_equal(found, expected)
    assert np.array_equal(other.by_text()[0], one.by_text()[2])
    assert list(other.errors) == [1]


def test_a_token_that_is_not_finite_costs_its_text_alone(encoder, monkeypatch):
    run = encoder.engine.run
    monkeypatch.setattr(
        encoder.engine, "run", lambda rows: np.where(rows.input_ids[:, :, None] == 1037, np.nan, run(rows))
    )
    encoded = encoder.encode_detailed(["the cat", "a cat sat", "the dog"])
    assert {at: type(error) for at, error in encoded.errors.items()} == {1: NotFiniteError}
    assert [bool(vectors.any()) for vectors in encoded.by_text()] == [True, False, True]


def test_what_needs_vectors_of_texts_refuses_and_pooled_encoders_have_no_tokens(
    encoder, tokens_bundle, make_bundle, tmp_path
):
    (tmp_path / "t.txt").write_text("a text\n")
    corpus = open_corpus([tmp_path / "t.txt"])
    for refused in (
        lambda: encoder.encode(["a"]),
        lambda: encode_file(encoder, corpus, tmp_path / "v.npy", long_texts="error"),
        lambda: write_temporary_repository(tokens_bundle, tmp_path, ServingOptions(engine="fake")),
    ):
        with pytest.raises(InputError, match="a vector for each token and none for a text"):
            refused()
    with Encoder.load(make_bundle(), engine="fake") as pooled, pytest.raises(InputError, match="--pooling tokens"):
        pooled.encode_tokens(["a"])
