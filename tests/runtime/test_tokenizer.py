import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from transformers import AutoTokenizer

from encoders.reference import Reference
from encoders.source import HeadSpec, resolve
from mirror_runtime import tokenizer as tokenizers
from mirror_runtime.errors import BundleError
from mirror_runtime.tokenizer import LongTexts, Tokenized, Tokenizer, text_span

TEXTS = ["A man is playing a guitar.", "", "   ", "emoji 🤖 and 漢字 and é", "nul \x00 inside"]
TEXTS += ["a [MASK] and a [SEP] in the text", "x" * 100_000, "word " * 20_000]


def make(minilm: Path, policy: LongTexts, max_tokens: int = 64, **options: Any) -> Tokenizer:
    return Tokenizer(minilm / "tokenizer.json", max_tokens, policy, **options)


def test_ids_are_those_of_transformers(minilm):
    ours = make(minilm, LongTexts.TRUNCATE)(TEXTS)
    theirs = AutoTokenizer.from_pretrained(minilm)(TEXTS, truncation=True, max_length=64)["input_ids"]
    assert pieces(ours) == theirs
    assert ours.truncated.tolist() == [False] * 7 + [True]
    assert ours.tokens[-1] == 20_002
    assert ours.tokens[1] == 2


def test_chunks_cover_the_whole_text_and_the_error_policy_names_both_numbers_and_spares_the_rest(minilm):
    ours = make(minilm, LongTexts.CHUNK)(["short", "word " * 130])
    assert ours.part_text.tolist() == [0, 1, 1, 1]
    assert ours.lengths[ours.part_piece].tolist() == [3, 64, 64, 130 - 2 * 62 + 2]
    assert not ours.truncated.any()
    assert ours.tokens.tolist() == [3, 132]
    ours = make(minilm, LongTexts.ERROR)(["word " * 100, "fine"])
    assert ours.part_text.tolist() == [1]
    assert "has 102 tokens, more than the encoder's 64" in ours.errors[0].reason


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "is NoneType, not str"),
        (7, "is int, not str"),
        (b"bytes", "is bytes, not str"),
        (["a"], "is list, not str"),
        ("lone \ud800 surrogate", "lone surrogate at character 5"),
    ],
)
def test_what_is_no_text_is_named_and_the_rest_unharmed(minilm, bad, message):
    ours = make(minilm, LongTexts.TRUNCATE)(["before", bad, "after"])
    assert list(ours.errors) == [1]
    assert message in str(ours.errors[1])
    assert ours.part_text.tolist() == [0, 2]


def test_a_broken_tokenizer_file_is_one_clear_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("absent.json", "tokenizer.json"):
        with pytest.raises(BundleError, match="is not a tokenizer"):
            Tokenizer(tmp_path / name, 64, LongTexts.TRUNCATE)


PROMPT = 'This sentence : "{text}" means [MASK] .'


def pieces(tokenized: Tokenized) -> list[list[int]]:
    """The pieces of every text, in the texts' order."""
    once = np.split(tokenized.ids, np.cumsum(tokenized.lengths)[:-1])
    return [once[place].tolist() for place in tokenized.part_piece]


def test_equal_pieces_are_there_once(minilm):
    ours = make(minilm, LongTexts.CHUNK)(["A dog", "a cat", "a  DOG", None, "a cat", "same " * 124])
    assert ours.lengths.tolist() == [4, 4, 64]
    assert ours.part_text.tolist() == [0, 1, 2, 4, 5, 5]
    assert ours.part_piece.tolist() == [0, 1, 0, 1, 2, 2]
    assert ours.tokens.tolist() == [4, 4, 4, 0, 4, 126]


@pytest.mark.parametrize("template", ["query: {text}", PROMPT, "[MASK]{text}", "un{text}able", "{text}s and so on"])
def test_a_template_is_tokenised_together_with_its_text(minilm, template):
    # In the last two the tokenizer makes one word of template and text.
    texts = [text for text in TEXTS if len(text) < 100] + ["", "believ", '"', "a [MASK] of its own"]
    theirs = AutoTokenizer.from_pretrained(minilm)([template.replace("{text}", text) for text in texts])["input_ids"]
    assert pieces(make(minilm, LongTexts.TRUNCATE, template=template)(texts)) == theirs


def test_truncation_shortens_the_text_and_never_the_template_which_every_chunk_has(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    short = make(minilm, LongTexts.TRUNCATE, 15, template=PROMPT)(["cat", "cat " * 40])
    assert short.truncated.tolist() == [False, True]
    assert short.tokens.tolist() == [11, 50]
    whole, cut = (tokenizer.decode(piece) for piece in pieces(short))
    assert whole == '[CLS] this sentence : " cat " means [MASK]. [SEP]'
    assert cut == '[CLS] this sentence : " cat cat cat cat cat " means [MASK]. [SEP]'
    assert short.lengths.tolist() == [11, 15]
    chunked = make(minilm, LongTexts.CHUNK, 15, template=PROMPT)(["cat " * 7 + "dog " * 5])
    assert [tokenizer.decode(piece).count("means [MASK]") for piece in pieces(chunked)] == [1, 1, 1]
    assert [tokenizer.decode(piece).count("cat") for piece in pieces(chunked)] == [5, 2, 0]
    assert chunked.part_text.tolist() == [0, 0, 0]
    assert not chunked.truncated.any()


def test_the_reference_tokenises_alike(minilm):
    source = resolve(str(minilm), max_tokens=16, head=HeadSpec(template=PROMPT))
    reference = Reference.load(source)
    texts = [*TEXTS[:6], "word " * 100, "x" * 500, "é" * 300]
    assert pieces(make(minilm, LongTexts.TRUNCATE, 16, template=PROMPT)(texts)) == reference.tokenize(texts)


def test_a_template_that_leaves_no_room_is_refused_and_a_token_that_touches_it_is_its_own(minilm):
    with pytest.raises(BundleError, match="has 8 tokens: 10 in all leave no room"):
        make(minilm, LongTexts.TRUNCATE, 10, template=PROMPT)
    assert len(make(minilm, LongTexts.TRUNCATE, 11, template=PROMPT)(["cat " * 9]).ids) == 11
    offsets = [(0, 2), (2, 5), (5, 7), (7, 9), (9, 12)]
    assert text_span(offsets, 2, 9) == (1, 4)
    assert text_span(offsets, 3, 8) == (2, 3)
    assert text_span(offsets, 3, 4) == (2, 2)
    assert text_span([], 0, 0) == (0, 0)


def test_padding_fills_every_piece_and_is_told_apart(minilm):
    # A text may spell the padding token out: that one is its own.
    padded = make(minilm, LongTexts.TRUNCATE, 8, pad_to=10)(["cat", "a [PAD]", "cat " * 20])
    assert padded.lengths.tolist() == [10, 10, 10]
    assert padded.unpadded_lengths is not None
    assert padded.unpadded_lengths.tolist() == [3, 4, 8]
    filled = [piece[own:] for piece, own in zip(pieces(padded), padded.unpadded_lengths, strict=True)]
    assert filled == [[0] * 7, [0] * 6, [0] * 2]


@pytest.fixture(scope="module")
def tokenizer_of(tiny_encoder: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    return cache(lambda family: Tokenizer(tiny_encoder(family) / "tokenizer.json", 4096, LongTexts.ERROR))


@pytest.mark.parametrize("family", ["bert", "roberta"])
@given(
    words=st.lists(
        st.text(st.sampled_from("aZéß Σ\r\x1c\u0301\u00a0\t\n,.'!-[]<mask>中😀\x00\u200d"), max_size=12), max_size=40
    ),
    size=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_very_long_text_has_the_same_tokens_segment_by_segment(tokenizer_of, family, words, size):
    whole, tokenizer = " ".join(words), tokenizer_of(family)
    expected = tokenizer([whole, "short", whole])
    with mock.patch.object(tokenizers, "LONG_CHARACTERS", size):
        found = tokenizer([whole, "short", whole])
        assert "".join(tokenizers._segments(whole, tokenizer._divide)) == whole
    assert pieces(found) == pieces(expected)
    assert found.tokens.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize(("family", "space"), [("bert", " "), ("bert", "\n\n"), ("bert", "\t"), ("roberta", " ")])
def test_no_segment_is_much_longer_than_allowed(tokenizer_of, family, space):
    segments = list(tokenizers._segments(f"word{space}" * 50_000, tokenizer_of(family)._divide))
    assert max(map(len, segments)) < tokenizers.LONG_CHARACTERS + 10
    assert len(segments) > 7


def test_other_tokenizers_take_texts_whole(tokenizer_of, tmp_path, tiny_encoder):
    assert tokenizer_of("xlm-roberta")._divide is None
    changed = json.loads((tiny_encoder("bert") / "tokenizer.json").read_text())
    changed["added_tokens"][-1]["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert Tokenizer(tmp_path / "tokenizer.json", 64, LongTexts.ERROR)._divide is None
