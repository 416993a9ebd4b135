"""Tokenise plain text from memory, word by word: ten times as fast as the library, with the same tokens.

A tokenizer that first splits a text into words and then each word into tokens needs the second step once a word. For
text of ASCII letters, digits and punctuation the first step is one regular expression, which is exact for two kinds of
tokenizers: BERT's (WordPiece) and GPT-2's (bytes, as in RoBERTa). Everything else is left to the library.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

MAX_WORDS = 65_536
"""Words in memory, about 15 MB. When there are more, all are forgotten: frequent ones come back within milliseconds."""

MAX_LETTERS = 32
"""Longer words are left to the library, so that odd texts do not fill the memory."""

NEW_WORDS = 4
"""Words learnt from one text at most. A text of unknown words is left to the library, which is then faster."""

BERT_WORDS = re.compile(r"[A-Za-z0-9]+|[^ \t\n\rA-Za-z0-9]")

GPT2_WORDS = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^ \t\n\rA-Za-z0-9]+|[ \t\n\r]+(?![^ \t\n\r])|[ \t\n\r]+"
)

GPT2_BYTES = str.maketrans({" ": "Ġ", "\t": "ĉ", "\n": "Ċ", "\r": "č"})
"""How a vocabulary of bytes writes white space. The other bytes of plain text are written as they are."""

PLAIN = frozenset(string.ascii_letters + string.digits + string.punctuation + " \t\n\r")


@dataclass(frozen=True)
class WordMemory:
    """The tokens of the words of plain text. Threads may share it."""

    model: Any  # of the library: the tokens of one word
    pattern: re.Pattern[str]
    lowercase: bool
    spelling: Mapping[int, str]  # of a word in the vocabulary
    plain: frozenset[str]  # characters of words that are exact
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordMemory | None:
        """Return the memory for a tokenizer; None if its words are not known to be those of a pattern."""
        normalizer, splits, model = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model
        marks = _marks_of_added_tokens(tokenizer)
        if marks is None or getattr(model, "dropout", None):
            return None
        normal, *kinds = (type(part).__name__ for part in (normalizer, splits, model))
        if kinds == ["BertPreTokenizer", "WordPiece"] and normal in ("BertNormalizer", "NoneType"):
            return cls(model, BERT_WORDS, normalizer is not None and normalizer.lowercase, {}, PLAIN - marks)
        exact = kinds == ["ByteLevel", "BPE"] and splits.use_regex and not splits.add_prefix_space
        if exact and normal in ("NFC", "NoneType"):
            return cls(model, GPT2_WORDS, False, GPT2_BYTES, PLAIN - marks)
        return None

    def encode(self, text: str) -> list[int] | None:
        """Return a text's tokens without special ones; None if the library has to tokenise it."""
        if not text.isascii():
            return None
        words = self.pattern.findall(text.lower() if self.lowercase else text)
        try:
            return list(chain.from_iterable(map(self.tokens.__getitem__, words)))
        except KeyError:
            return self._learn(words)

    def _learn(self, words: list[str]) -> list[int] | None:
        """Return the tokens of words that are not all known; None if too many are not, or one is not plain."""
        new = {word for word in words if word not in self.tokens}
        learnt = sorted(new)[:NEW_WORDS]
        if len(self.tokens) + len(learnt) > MAX_WORDS:
            self.tokens.clear()
        for word in learnt:
            if len(word) > MAX_LETTERS or not self.plain.issuperset(word):
                return None
            self.tokens[word] = [token.id for token in self.model.tokenize(word.translate(self.spelling))]
        if len(new) > len(learnt):
            return None
        try:  # another thread may have forgotten all
            return list(chain.from_iterable(map(self.tokens.__getitem__, words)))
        except KeyError:
            return None


def _marks_of_added_tokens(tokenizer: Tokenizer) -> frozenset[str] | None:
    """Return a punctuation mark of each added token, such as `[` for `[MASK]`; None if one has none.

    A text without these marks contains no added token, which would be found before the text is split into words.
    """
    marks = set()
    for token in tokenizer.get_added_tokens_decoder().values():
        found = next((letter for letter in token.content if letter in string.punctuation), None)
        if found is None:
            return None
        marks.add(found)
    return frozenset(marks)
