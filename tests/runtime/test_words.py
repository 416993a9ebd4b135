"""Words from memory: the library's own tokens, for every text that is not left to it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tokenizers import Tokenizer

from mirror_runtime import words
from mirror_runtime.words import WordMemory

FAMILIES = ["bert", "roberta"]
MAKERS = [
    "don't",
    "We're the Cat's I'LL ",
    "x_y",
    "3.14",
    "a  b",
    "\t\n",
    " ",
    "[MASK]",
    "<mask>",
    "##ing",
    "Ġ",
    "é",
    "K",
    "\x7f",
]


@pytest.fixture(scope="module")
def library(tiny_encoder: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    def load(family: str) -> Tokenizer:
        tokenizer = Tokenizer.from_file(str(tiny_encoder(family) / "tokenizer.json"))
        tokenizer.no_truncation()
        return tokenizer

    return cache(load)


def memory_of(tokenizer: Tokenizer) -> WordMemory:
    memory = WordMemory.of(tokenizer)
    assert memory is not None
    return memory


@pytest.mark.parametrize("family", FAMILIES)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(MAKERS) | st.text(st.characters(max_codepoint=300), max_size=8), max_size=12).map(
            "".join
        ),
        max_size=4,
    )
)
@example(texts=["", "the cat", "the cat", " the\r\n cat ", "a\x1cb", "\u212a", "x" * 200])
@settings(max_examples=300, deadline=None, derandomize=True)
def test_words_from_memory_have_the_librarys_tokens(library, family, texts):
    tokenizer = library(family)
    memory = memory_of(tokenizer)
    for text in [*texts, *texts]:
        found = memory.encode(text)
        assert found is None or found == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("The cat, don't sit!", True),
        ("caf\u00e9", False),
        ("a\x00b", False),
        ("[MASK] or <mask>", False),
        ("x" * (words.MAX_LETTERS + 1), False),
        (" ".join(f"w{i}" for i in range(50)), False),
    ],
)
def test_plain_text_comes_from_memory_and_other_text_does_not(library, family, text, known):
    memory = memory_of(library(family))
    for _ in range(2):
        memory.encode(text)
    assert (memory.encode(text) is not None) == known


def test_text_of_new_words_is_learnt_a_few_words_at_a_time(library):
    memory, text = memory_of(library("bert")), " ".join(f"w{i}" for i in range(3 * words.NEW_WORDS))
    assert [memory.encode(text) is not None for _ in range(4)] == [False, False, True, True]


def test_memory_is_bounded(library, monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 10)
    memory, tokenizer = memory_of(library("bert")), library("bert")
    for i in range(100):
        text = f"a{i} b{i} cat"
        assert memory.encode(text) in (None, tokenizer.encode(text, add_special_tokens=False).ids)
        assert len(memory.tokens) <= 10


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("bert", {"normalizer": {"type": "Lowercase"}}),
        ("bert", {"pre_tokenizer": {"type": "Whitespace"}}),
        ("bert", {"added_tokens": [{"id": 5, "content": "cat"}]}),
        ("roberta", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}),
        ("xlm-roberta", {}),
    ],
)
def test_a_tokenizer_of_another_kind_is_left_to_the_library(tiny_encoder, family, change):
    state = json.loads((tiny_encoder(family) / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for token in change.get("added_tokens", []):
        token.update(flags)
    assert WordMemory.of(Tokenizer.from_str(json.dumps(state | change))) is None


def test_a_cased_tokenizer_keeps_case(tiny_encoder):
    state = json.loads((tiny_encoder("bert") / "tokenizer.json").read_text(encoding="utf-8"))
    state["normalizer"]["lowercase"] = False
    tokenizer = Tokenizer.from_str(json.dumps(state))
    assert memory_of(tokenizer).encode("The CAT") == tokenizer.encode("The CAT", add_special_tokens=False).ids
