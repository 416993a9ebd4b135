"""Tokenise a window of texts in one call, with a policy for long texts and an error for each bad one.

If the encoder has a template, the whole string is tokenised, template and text together. A token may span both, exactly
as if the template had been put around the text by hand. A string of too many tokens loses tokens from the end of the
text; those of the template stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _Tokenizer

from mirror_runtime.bundle import TOKENIZER_FILE, EncoderSpec
from mirror_runtime.errors import BundleError, InputError, MirrorError, TextError, one_line
from mirror_runtime.host import usable_cores
from mirror_runtime.strict_json import read_object
from mirror_runtime.words import WordMemory

SPECIAL_TOKENS_FILE = "special_tokens_map.json"
"""The file that names the padding token, which `tokenizer.json` does not."""

Item: TypeAlias = "str | tuple[str, str]"
"""What gets a vector: a text, or for a reranker a pair of a query and a text."""

_T = TypeVar("_T")

LONG_CHARACTERS = 32_768
"""Longer texts are tokenised in segments of this length, 20 to 40 ms of work, and queue apart from the others."""


class LongTexts(str, Enum):
    """The policy for texts of more than `max_tokens` tokens."""

    TRUNCATE = "truncate"
    """Keep the first `max_tokens`; the text is marked as truncated and counted."""
    ERROR = "error"
    """Reject the text; the others are encoded."""
    CHUNK = "chunk"
    """Split it into chunks of `max_tokens`, encode each, and average their vectors (normalised again)."""
    CHUNK_WEIGHTED = "chunk-weighted"
    """Likewise, each chunk weighing as much as it has tokens: a short last one counts less."""
    CHUNK_MAX = "chunk-max"
    """Likewise, but take the largest of each component: what one chunk alone says stays."""

    @property
    def splits(self) -> bool:
        """Whether a long text is split into chunks, so that it keeps all of its tokens."""
        return self in (LongTexts.CHUNK, LongTexts.CHUNK_WEIGHTED, LongTexts.CHUNK_MAX)


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """A window of texts as pieces ready to be packed.

    A text becomes one part, or several if it was split into chunks. Equal parts share one piece, which is packed and
    computed once: also parts of different texts with the same tokens, such as "A dog" and "a  dog" where the tokenizer
    ignores case and spaces.
    """

    ids: NDArray[np.int64]  # [sum of lengths], the pieces' tokens one after another, special tokens included
    lengths: NDArray[np.int64]  # [pieces], each piece's tokens, padding included
    unpadded_lengths: NDArray[np.int64] | None  # likewise before padding; None if nothing is padded
    first_lengths: NDArray[np.int64] | None = None  # likewise before a pair's second text; None if pieces are texts
    part_text: NDArray[np.int64]  # [parts], the text of each part; ascending. A failed text has no part
    part_piece: NDArray[np.int64]  # [parts]
    tokens: NDArray[np.int64]  # [texts], of the whole text with special tokens, before truncation; 0 if it failed
    truncated: NDArray[np.bool_]  # [texts]
    errors: Mapping[int, TextError]  # of the failed texts, by position
    long_texts: LongTexts = LongTexts.CHUNK  # how the vectors of a text's parts are joined

    @property
    def kept_tokens(self) -> NDArray[np.int64]:
        """Return the tokens of each text's parts together, [texts]: 0 for a failed text."""
        counts = np.zeros(len(self.tokens), np.int64)
        np.add.at(counts, self.part_text, self.lengths[self.part_piece])
        return counts


class Tokenizer:
    """A bundle's tokenizer with its length limit.

    The file's own truncation and padding settings are ignored, because the `EncoderSpec` has these. With `pad_to`,
    every piece is padded; `SPECIAL_TOKENS_FILE` beside the tokenizer names the padding token. Special tokens must stand
    just before and after the text, and the template must leave room for it.
    """

    def __init__(
        self,
        path: Path,
        max_tokens: int,
        long_texts: LongTexts,
        *,
        template: str | None = None,
        pad_to: int | None = None,
    ) -> None:
        try:
            self._tokenizer: _Tokenizer = _Tokenizer.from_file(str(path))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._prefix, self._suffix = _special_tokens(self._tokenizer, path)
        except MirrorError:
            raise
        except BaseException as error:  # the library raises bare Exception for a malformed file, or panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BundleError(f"{path} is not a tokenizer: {one_line(error)}") from error
        self._body = max_tokens - len(self._prefix) - len(self._suffix)
        if self._body < 1:
            raise BundleError(f"max_tokens is {max_tokens}: the special tokens leave no room for a text")
        self._max_tokens = max_tokens
        self._long_texts = long_texts
        self._before, _, self._after = (template or "{text}").partition("{text}")
        taken = len(self._tokenizer.encode(self._before + self._after, add_special_tokens=False).ids)
        if taken >= self._body:
            raise BundleError(
                f"the template {template!r} has {taken} tokens: {max_tokens} in all leave no room for a text"
            )
        self._divide = _divisible_at(self._tokenizer)
        self._words = WordMemory.of(self._tokenizer)
        self._pad_to = pad_to
        self._pad_id = 0 if pad_to is None else _padding_token(self._tokenizer, path.with_name(SPECIAL_TOKENS_FILE))

    @classmethod
    def of(cls, folder: Path, spec: EncoderSpec, long_texts: LongTexts) -> Tokenizer:
        """Load the tokenizer of a bundle or a run folder, for packed rows."""
        return cls(folder / TOKENIZER_FILE, spec.max_tokens, long_texts, template=spec.template, pad_to=spec.pad_to)

    def __call__(self, texts: Sequence[object], long_texts: Sequence[LongTexts] | None = None) -> Tokenized:
        """Tokenise a window of texts, each by its policy or the tokenizer's own. `errors` has the bad ones."""
        errors = {i: error for i, text in enumerate(texts) if (error := validate_text(i, text)) is not None}
        good = [i for i in range(len(texts)) if i not in errors]
        tokens = np.zeros(len(texts), np.int64)
        truncated = np.zeros(len(texts), np.bool_)
        numbers: dict[tuple[int, ...], int] = {}
        part_text: list[int] = []
        part_piece: list[int] = []
        special = len(self._prefix) + len(self._suffix)
        for i, own in zip(good, self.bodies([self._whole(texts[i]) for i in good]), strict=True):
            tokens[i] = len(own) + special
            if len(own) > self._body:
                policy = self._long_texts if long_texts is None else long_texts[i]
                if policy is LongTexts.ERROR:
                    errors[i] = TextError(
                        i,
                        f"has {tokens[i]} tokens, more than the encoder's {self._max_tokens}: "
                        "shorten it, or choose the policy truncate or chunk",
                    )
                    tokens[i] = 0
                    continue
                parts = self._parts(texts[i], own, policy)
                if not parts:
                    errors[i] = TextError(i, "merges with the template into more tokens than the encoder takes")
                    tokens[i] = 0
                    continue
                truncated[i] = len(parts) == 1
            else:
                parts = [own]
            part_piece += [numbers.setdefault(tuple(part), len(numbers)) for part in parts]
            part_text += [i] * len(parts)
        pieces = [[*self._prefix, *part, *self._suffix] for part in numbers]
        unpadded_lengths = None
        if self._pad_to is not None or not all(pieces):
            unpadded_lengths = _lengths(pieces)
            # Where no special tokens are added, a text may have no tokens at all, and takes one place of a row.
            pieces = [piece + [self._pad_id] * ((self._pad_to or 1) - len(piece)) for piece in pieces]
        ids, lengths = piece_arrays(pieces)
        return Tokenized(
            ids=ids,
            lengths=lengths,
            unpadded_lengths=unpadded_lengths,
            part_text=np.array(part_text, np.int64),
            part_piece=np.array(part_piece, np.int64),
            tokens=tokens,
            truncated=truncated,
            errors=errors,
            long_texts=self._long_texts,
        )

    def bodies(self, wholes: Sequence[str]) -> Iterator[list[int]]:
        """Yield the tokens of whole strings without special ones.

        Very long strings are tokenised segment by segment, where that gives the same tokens.

        A string of 4 MB at once takes 0.8 GB, and other threads wait while they are freed (2026-11-30).
        """
        divide = self._divide
        segmented = [divide is not None and len(whole) > LONG_CHARACTERS for whole in wholes]
        encoded = self._encode_short([whole for whole, long in zip(wholes, segmented, strict=True) if not long])
        for whole, long in zip(wholes, segmented, strict=True):
            if divide is None or not long:
                yield next(encoded)
                continue
            ids: list[int] = []
            segments = _segments(whole, divide)
            while group := list(islice(segments, usable_cores())):
                ids += chain.from_iterable(self._encode_short(group))
            yield ids

    def _encode_short(self, wholes: Sequence[str]) -> Iterator[list[int]]:
        """Yield the tokens of strings: from memory where that has their words, else from the library in one call."""
        remembered = [None if self._words is None else self._words.encode(whole) for whole in wholes]
        others = [whole for whole, ids in zip(wholes, remembered, strict=True) if ids is None]
        encodings: Iterator[Any] = iter(
            self._tokenizer.encode_batch_fast(others, add_special_tokens=False) if others else ()
        )
        for ids in remembered:
            yield next(encodings).ids if ids is None else ids

    def pair_tokens(self, path: Path) -> tuple[list[int], list[int], list[int], bool]:
        """Return the special tokens before, between and after two texts, and whether the second has another type."""
        body = self._tokenizer.encode("a", add_special_tokens=False).ids
        pair = self._tokenizer.encode("a", "a", add_special_tokens=True)
        head, size = len(self._prefix) + len(body), len(body)
        second = next((at for at in range(head + 1, len(pair.ids) - size + 1) if pair.ids[at : at + size] == body), 0)
        types = [0] * second + [1] * (len(pair.ids) - second)
        if not second or pair.ids[:head] != [*self._prefix, *body] or pair.type_ids not in (types, [0] * len(types)):
            raise BundleError(f"{path} does not join two texts by special tokens: 'a' and 'a' become {pair.ids}")
        return self._prefix, pair.ids[head:second], pair.ids[second + size :], pair.type_ids == types

    def _whole(self, text: object) -> str:
        return f"{self._before}{text}{self._after}" if self._before or self._after else str(text)

    def offsets(self, texts: Sequence[str], skip: int = 0) -> list[list[NDArray[np.int64]]]:
        """Return the characters of each token of each part of valid texts, by the tokenizer's own policy.

        Args:
            texts: those that `__call__` took without an error.
            skip: characters at the start of every text that are not the caller's, such as a prompt.

        Returns:
            For each text's parts int64 [tokens, 2], half-open ranges of the characters after `skip`; 0, 0 for special
            tokens, the template's and those of what is skipped.
        """
        begin = len(self._before) + skip
        found = []
        wholes = [self._whole(text) for text in texts]
        for text, encoding in zip(texts, self._tokenizer.encode_batch(wholes, add_special_tokens=False), strict=True):
            spans = (np.array(encoding.offsets, np.int64).reshape(-1, 2) - begin).clip(0, len(text) - skip)
            spans[spans[:, 0] == spans[:, 1]] = 0
            own = [*map(tuple, spans.tolist())]
            parts = [own] if len(own) <= self._body else self._parts(text, own, self._long_texts)
            special = [(0, 0)] * len(self._prefix), [(0, 0)] * len(self._suffix)
            found.append([np.array([*special[0], *part, *special[1]], np.int64).reshape(-1, 2) for part in parts])
        return found

    def _parts(self, text: object, own: list[_T], policy: LongTexts) -> list[list[_T]]:
        """Cut what belongs to the tokens of a long string, without special ones, by a policy that keeps it.

        Each part has the template's tokens. There is none where these leave no room.
        """
        first, last = 0, len(own)
        if self._before or self._after:
            encoding = self._tokenizer.encode(self._whole(text), add_special_tokens=False)
            first, last = text_span(encoding.offsets, len(self._before), len(self._before) + len(str(text)))
        room = self._body - first - (len(own) - last)
        if room < 1:
            return []
        starts = range(first, last, room) if policy.splits else (first,)
        return [own[:first] + own[at : min(at + room, last)] + own[last:] for at in starts]


def iterate(texts: Iterable[object]) -> Iterator[object]:
    """Iterate over texts, but not over what is one text, a table, or nothing to iterate over.

    Raises:
        InputError: it is one of these.
    """
    kind = type(texts).__name__
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):  # iterating would yield the names of its columns
        raise InputError(f"texts is a {kind}: pass one column, such as list(texts['text'])")
    try:
        if not isinstance(texts, (str, bytes)):
            return iter(texts)
    except TypeError:
        pass
    raise InputError(f"texts is one {kind}: pass a list, such as [text]")


def characters(item: Item) -> int:
    """Count the characters of a text, or of both texts of a pair."""
    return len(item) if isinstance(item, str) else sum(map(len, item))


def validate_text(index: int, text: object) -> TextError | None:
    """Return an error if a text is not a string or contains a lone surrogate; else None."""
    if not isinstance(text, str):
        return TextError(index, f"is {type(text).__name__}, not str: decode or convert it first")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return TextError(
                index,
                f"contains a lone surrogate at character {error.start}, which is not valid Unicode: "
                "decode its bytes with errors='replace'",
            )
    return None


def text_span(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """Find the tokens that lie wholly within characters `begin` to `end` of a string, as a half-open range.

    `offsets` has the half-open range of each token's characters.
    """
    first = next((i for i, (start, _) in enumerate(offsets) if start >= begin), len(offsets))
    last = next((i for i in range(len(offsets), first, -1) if offsets[i - 1][1] <= end), first)
    return first, last


def _divisible_at(tokenizer: _Tokenizer) -> re.Pattern[str] | None:
    """Return where a string may be divided so that its tokens are those of both parts; None if that is not known.

    The pre-tokenizer splits words there before anything else, and the normalizer does not look across.
    """
    splits, normalizer = tokenizer.pre_tokenizer, tokenizer.normalizer
    if not (normalizer is None or type(normalizer).__name__ == "BertNormalizer") or any(
        token.rstrip or re.search(r"\s", token.content) for token in tokenizer.get_added_tokens_decoder().values()
    ):
        return None
    if type(splits).__name__ == "BertPreTokenizer":
        return re.compile(r"[ \t\n\r]")
    if type(splits).__name__ == "ByteLevel" and splits.use_regex:
        return re.compile(r"(?<=\S) (?=\S)")  # a word takes the one space before it
    return None


def _segments(text: str, divide: re.Pattern[str]) -> Iterator[str]:
    """Divide a text into segments that are hardly longer than `LONG_CHARACTERS`."""
    start = 0
    while place := divide.search(text, start + LONG_CHARACTERS):
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


def piece_arrays(pieces: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens of pieces one after another, and each piece's number of tokens."""
    lengths = _lengths(pieces)
    return np.fromiter(chain.from_iterable(pieces), np.int64, int(lengths.sum())), lengths


def _lengths(pieces: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.fromiter(map(len, pieces), np.int64, len(pieces))


def _padding_token(tokenizer: _Tokenizer, path: Path) -> int:
    try:
        name = read_object(path, "no padding token")["pad_token"]
        name = name["content"] if isinstance(name, dict) else name
        found = tokenizer.token_to_id(name)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} has no padding token, which this encoder's pooling needs: {error}") from error
    if found is None:
        raise BundleError(f"{path} has the padding token {name!r}, which the tokenizer does not know")
    return int(found)


def _special_tokens(tokenizer: _Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer adds before and after a text, such as [CLS] and [SEP]."""
    body = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    if full == body:  # also where the vocabulary lacks this letter
        return [], []
    for at in range(len(full) - len(body) + 1):
        if body and full[at : at + len(body)] == body:
            return list(full[:at]), list(full[at + len(body) :])
    raise BundleError(f"{path}: cannot separate its special tokens from the text's ('a' becomes {full})")
