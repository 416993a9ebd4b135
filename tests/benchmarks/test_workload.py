"""The workload: read, sampled and cut to the lengths that were requested."""

import dataclasses

import numpy as np
import pytest

from benchmarks.workload import QUICK_TEXTS, Shape, bundle_tokenizer, load_workload, texts_of_length
from mirror_runtime.bundle import TOKENIZER_FILE
from mirror_runtime.errors import InputError


@pytest.fixture
def tokenizer(minilm):
    return bundle_tokenizer(minilm / TOKENIZER_FILE, 32)


def test_a_file_keeps_its_order_and_loses_blank_lines(tokenizer, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("second word\r\n\n  \nfirst " + "word " * 50 + "\n", encoding="utf-8")
    workload = load_workload(file, tokenizer, quick=False, seed=0)
    assert [text.split()[0] for text in workload.texts] == ["second", "first"]
    facts = workload.facts
    found = (facts.texts, facts.distinct, facts.tokens_max, facts.truncated)
    assert found == (2, 2, 32, 1)  # the limit cuts the second
    assert facts.tokens_mean == (4 + 32) / 2


def test_quick_takes_a_seeded_sample_of_a_file_or_of_docstrings(tokenizer, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"text {i}" for i in range(3 * QUICK_TEXTS)), encoding="utf-8")
    for path in (file, None):
        one, same, other = (load_workload(path, tokenizer, quick=True, seed=seed) for seed in (1, 1, 2))
        assert len(set(one.texts)) == QUICK_TEXTS
        assert one == same
        assert one.texts != other.texts
    assert one.facts.tokens_p50 < one.facts.tokens_p90 < one.facts.tokens_max


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_texts_is_refused(tokenizer, tmp_path, content):
    file = tmp_path / "texts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"texts\.txt"):
        load_workload(file, tokenizer, quick=False, seed=0)


def test_words_are_cut_into_texts_of_drawn_lengths(minilm):
    whole = bundle_tokenizer(minilm / TOKENIZER_FILE, 512)
    lines = load_workload(None, whole, quick=False, seed=0)
    passages, mixed = (load_workload(None, whole, quick=False, seed=0, shape=shape) for shape in list(Shape)[1:])
    lengths = whole(passages.texts).tokens
    assert (lengths.min(), 200 < lengths.max() <= 256 + 20) >= (96, True)
    assert 150 < lengths.mean() < 200
    short_and_long = whole(mixed.texts).tokens
    assert 5 <= short_and_long.min() < 10
    assert 400 < short_and_long.max() <= 512
    assert np.median(short_and_long) < 100  # most are short
    words = " ".join(lines.texts).split()
    for workload in (passages, mixed):
        assert words[: len(" ".join(workload.texts).split())] == " ".join(workload.texts).split()
    assert "96 to 256 tokens" in passages.facts.source


@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_texts_have_exactly_the_length(tokenizer, tokens):
    words = [f"{word} naïve tokenisation," for word in ("bread", "unquestionably", "rain", "of", "light", "hydrology")]
    texts = texts_of_length(words, tokenizer, tokens, count=4, seed=0)
    assert len(texts) == 4
    assert tokenizer(texts).tokens.tolist() == [tokens] * 4


def test_too_few_words_are_an_error_and_texts_that_miss_the_length_are_not_used(tokenizer):
    with pytest.raises(InputError, match="use a --texts file with more words"):
        texts_of_length(["one"], tokenizer, 32, count=4, seed=0)

    def merging(texts):  # as a byte-level tokenizer may: words together have other tokens than each alone
        tokenized = tokenizer(texts)
        return dataclasses.replace(tokenized, tokens=tokenized.tokens + np.array([" " in text for text in texts]))

    with pytest.raises(InputError, match="make 0 texts of exactly 8 tokens"):
        texts_of_length(["rain of light"], merging, 8, count=1, seed=0)
