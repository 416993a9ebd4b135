from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mirror_runtime.errors import BundleError
from mirror_runtime.tokens import LongTexts, Tokenizer

TEXTS = [
    "A man is playing a guitar.",
    "",
    "   ",
    "emoji 🤖 and 漢字 and é",
    "nul \x00 inside",
    "a [MASK] and a [SEP] in the text",
    "x" * 100_000,
    "word " * 20_000,
]


def make(minilm: Path, policy: LongTexts, max_tokens: int = 64) -> Tokenizer:
    return Tokenizer(minilm / "tokenizer.json", max_tokens, policy)


def test_ids_are_those_of_transformers(minilm):
    ours = make(minilm, LongTexts.TRUNCATE)(TEXTS)
    theirs = AutoTokenizer.from_pretrained(minilm)(TEXTS, truncation=True, max_length=64)["input_ids"]
    ends = np.cumsum(ours.lengths)
    assert [ours.ids[end - n : end].tolist() for end, n in zip(ends, ours.lengths, strict=True)] == theirs
    assert ours.truncated.tolist() == [False] * 7 + [True]
    assert ours.tokens[-1] == 20_002
    assert ours.tokens[1] == 2


def test_chunks_cover_the_whole_text(minilm):
    ours = make(minilm, LongTexts.CHUNK)(["short", "word " * 130])
    assert ours.owners.tolist() == [0, 1, 1, 1]
    assert ours.lengths.tolist() == [3, 64, 64, 130 - 2 * 62 + 2]
    assert not ours.truncated.any()
    assert ours.tokens.tolist() == [3, 132]


def test_the_error_policy_names_both_numbers_and_spares_the_rest(minilm):
    ours = make(minilm, LongTexts.ERROR)(["word " * 100, "fine"])
    assert ours.owners.tolist() == [1]
    assert "has 102 tokens and the encoder takes 64" in ours.errors[0].reason


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
    assert ours.owners.tolist() == [0, 2]


def test_a_broken_tokenizer_file_is_one_clear_error(tmp_path):
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "absent.json", 64, LongTexts.TRUNCATE)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", 64, LongTexts.TRUNCATE)
