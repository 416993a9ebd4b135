"""Texts to token ids: one call for a window of texts, with the policy for long ones and an error per bad text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _Tokenizer

from mirror_runtime.errors import BundleError, TextError


class LongTexts(str, Enum):
    """What happens to a text of more tokens than the encoder takes."""

    TRUNCATE = "truncate"
    """Keep the first `max_tokens`; the text is marked as truncated and counted."""
    ERROR = "error"
    """Refuse the text; the others are encoded."""
    CHUNK = "chunk"
    """Cut it into pieces of `max_tokens`, encode each, and take the mean of their vectors (normalised again)."""


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """A window of texts as pieces ready to be packed. A text is one piece unless it was cut into chunks.

    Attributes:
        ids: int64 [sum of lengths], the pieces' token ids one after another, special tokens included.
        lengths: int64 [pieces], tokens of each piece.
        owners: int64 [pieces], the text each piece belongs to; ascending, a failed text has none.
        tokens: int64 [texts], tokens of the whole text with special tokens, before any policy; 0 for a failed text.
        truncated: bool [texts].
        errors: the failed texts, by position.
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    owners: NDArray[np.int64]
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    errors: Mapping[int, TextError]


class Tokenizer:
    """A bundle's tokenizer with its length limit.

    Args:
        path: a `tokenizer.json`. Truncation and padding settings inside it are ignored: the bundle's spec rules.
        max_tokens: longest piece in tokens, special tokens included.
        long_texts: policy for longer texts.

    Raises:
        BundleError: the file cannot be read, or puts special tokens elsewhere than around the text.
    """

    def __init__(self, path: Path, max_tokens: int, long_texts: LongTexts) -> None:
        try:
            self._tokenizer: _Tokenizer = _Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a missing and for a malformed file
            raise BundleError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._prefix, self._suffix = _special_tokens(self._tokenizer, path)
        self._body = max_tokens - len(self._prefix) - len(self._suffix)
        if self._body < 1:
            raise BundleError(f"max_tokens is {max_tokens}, which leaves no room beside the special tokens")
        self._max_tokens = max_tokens
        self._long_texts = long_texts

    def __call__(self, texts: Sequence[object]) -> Tokenized:
        """Tokenise a window of texts. Never raises for a bad text: it is named in `errors`."""
        errors = {i: error for i, text in enumerate(texts) if (error := defect(i, text)) is not None}
        good = [i for i in range(len(texts)) if i not in errors]
        encodings: list[Any] = self._tokenizer.encode_batch_fast([texts[i] for i in good], add_special_tokens=False)
        tokens = np.zeros(len(texts), np.int64)
        truncated = np.zeros(len(texts), np.bool_)
        pieces: list[list[int]] = []
        owners: list[int] = []
        special = len(self._prefix) + len(self._suffix)
        for i, encoding in zip(good, encodings, strict=True):
            ids: list[int] = encoding.ids
            tokens[i] = len(ids) + special
            if len(ids) > self._body:
                if self._long_texts is LongTexts.ERROR:
                    errors[i] = TextError(i, self._too_long(int(tokens[i])))
                    tokens[i] = 0
                    continue
                if self._long_texts is LongTexts.CHUNK:
                    parts = [ids[at : at + self._body] for at in range(0, len(ids), self._body)]
                    pieces += (self._prefix + part + self._suffix for part in parts)
                    owners += [i] * len(parts)
                    continue
                truncated[i] = True
                ids = ids[: self._body]
            pieces.append(self._prefix + ids + self._suffix)
            owners.append(i)
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        return Tokenized(
            ids=np.fromiter(chain.from_iterable(pieces), np.int64, int(lengths.sum())),
            lengths=lengths,
            owners=np.array(owners, np.int64),
            tokens=tokens,
            truncated=truncated,
            errors=errors,
        )

    def _too_long(self, tokens: int) -> str:
        return (
            f"has {tokens} tokens and the encoder takes {self._max_tokens}: "
            "shorten it, or choose the policy truncate or chunk"
        )


def defect(index: int, text: object) -> TextError | None:
    """Say what keeps a text from being encoded: it is no string, or holds a lone surrogate. None where all is well."""
    if not isinstance(text, str):
        return TextError(index, f"is {type(text).__name__}, not str: decode or convert it first")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return TextError(
                index,
                f"holds a lone surrogate at character {error.start}, which is no Unicode text: "
                "decode its bytes with errors='replace'",
            )
    return None


def _special_tokens(tokenizer: _Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """Split what the tokenizer puts around a text, such as [CLS] and [SEP]."""
    body = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    for at in range(len(full) - len(body) + 1):
        if body and full[at : at + len(body)] == body:
            return list(full[:at]), list(full[at + len(body) :])
    raise BundleError(f"{path}: cannot tell its special tokens from the text's (it makes {full} of 'a')")
