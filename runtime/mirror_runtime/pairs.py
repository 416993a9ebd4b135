"""What a reranker reads: pairs of a query and a text, tokenised into one sequence each, as PyTorch's tokenizers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from mirror_runtime.bundle import TOKENIZER_FILE, EncoderSpec
from mirror_runtime.encoded import check_text_vectors
from mirror_runtime.errors import BundleError, InputError, TextError
from mirror_runtime.tokenizer import Item, LongTexts, Tokenized, Tokenizer, piece_arrays, validate_text

LONGEST_QUERY = 10_000
"""In characters, of a request to a server: a longer one would be tokenised again for each part of its texts."""


def tokenizer_of(folder: Path, spec: EncoderSpec, long_texts: LongTexts) -> Tokenizer | PairTokenizer:
    """Load the tokenizer of a bundle or a run folder, for packed rows: of texts, or of pairs for a reranker."""
    if spec.scores_pairs:
        return PairTokenizer(folder / TOKENIZER_FILE, spec.max_tokens, long_texts)
    return Tokenizer.of(folder, spec, long_texts)


def validator_of(spec: EncoderSpec) -> Callable[[int, object], TextError | None]:
    """Return the check of one input: of a text, or of a pair for a reranker."""
    return validate_pair if spec.scores_pairs else validate_text


def items_for(spec: EncoderSpec, texts: Sequence[str]) -> list[Item]:
    """Make inputs of texts, for measurements: the texts themselves, or for a reranker each with the one before it."""
    return list(pairwise([*texts[-1:], *texts])) if spec.scores_pairs else list(texts)


def canary_items(spec: EncoderSpec, texts: Sequence[str]) -> list[Item]:
    """Make inputs of a bundle's canaries; a reranker scores each as an answer to the first."""
    return [(texts[0], text) for text in texts] if spec.scores_pairs else list(texts)


def check_has_vectors(spec: EncoderSpec) -> None:
    """Raise an `InputError` where vectors of texts are needed and the encoder has scores of pairs, or of tokens."""
    check_text_vectors(spec)
    if spec.scores_pairs:
        raise InputError(
            f"{spec.base_model} is a reranker, which scores pairs and has no vectors: load it with "
            "mirror_runtime.Reranker, or serve it with mirror gateway"
        )


def validate_pair(index: int, pair: object) -> TextError | None:
    """Return an error unless a pair is a query and a text, both valid; else None."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return TextError(index, f"is {type(pair).__name__}, not a pair: a reranker scores (query, text)")
    return next((error for part in pair if (error := validate_text(index, part)) is not None), None)


class PairTokenizer:
    """A reranker's tokenizer with its length limit: [CLS] query [SEP] text [SEP] in BERT's case, each piece a pair.

    A pair of too many tokens loses tokens from the end of its longer part, as with `longest_first` in transformers.
    """

    def __init__(self, path: Path, max_tokens: int, long_texts: LongTexts) -> None:
        if long_texts.splits:
            raise InputError("a reranker has no vectors of chunks to join: choose long_texts truncate or error")
        self._single = Tokenizer(path, max_tokens, LongTexts.TRUNCATE)
        self._prefix, self._middle, self._suffix, self._has_types = self._single.pair_tokens(path)
        self._max_tokens, self._long_texts = max_tokens, long_texts
        self._room = max_tokens - len(self._prefix) - len(self._middle) - len(self._suffix)
        if self._room < 2:
            raise BundleError(f"max_tokens is {max_tokens}: the special tokens leave no room for a pair")

    def __call__(self, pairs: Sequence[object], long_texts: Sequence[LongTexts] | None = None) -> Tokenized:
        """Tokenise a window of pairs, each by its policy or the tokenizer's own. `errors` has the bad ones."""
        errors = {i: error for i, pair in enumerate(pairs) if (error := validate_pair(i, pair)) is not None}
        good: dict[int, tuple[str, str]] = {i: tuple(pair) for i, pair in enumerate(pairs) if i not in errors}  # type: ignore[arg-type, misc]
        distinct = list(dict.fromkeys(chain.from_iterable(good.values())))  # a query comes with many texts
        ids_of = dict(zip(distinct, self._single.bodies(distinct), strict=True))
        tokens = np.zeros(len(pairs), np.int64)
        truncated = np.zeros(len(pairs), np.bool_)
        numbers: dict[tuple[int, tuple[int, ...]], int] = {}  # of each piece, with the tokens before its text
        parts: list[tuple[int, int]] = []
        for i, (query, text) in good.items():
            first, second = ids_of[query], ids_of[text]
            tokens[i] = len(first) + len(second) + self._max_tokens - self._room
            if tokens[i] > self._max_tokens:
                if (self._long_texts if long_texts is None else long_texts[i]) is LongTexts.ERROR:
                    errors[i] = TextError(
                        i,
                        f"has {tokens[i]} tokens with its query, more than the reranker's {self._max_tokens}: "
                        "shorten it, or choose the policy truncate",
                    )
                    tokens[i] = 0
                    continue
                kept = longest_first(len(first), len(second), self._room)
                first, second, truncated[i] = first[: kept[0]], second[: kept[1]], True
            head = (*self._prefix, *first, *self._middle)
            piece = (len(head), (*head, *second, *self._suffix))
            parts.append((i, numbers.setdefault(piece, len(numbers))))
        ids, lengths = piece_arrays([piece for _, piece in numbers])
        part_text, part_piece = np.array(parts, np.int64).reshape(-1, 2).T
        return Tokenized(
            ids=ids,
            lengths=lengths,
            unpadded_lengths=None,
            first_lengths=np.array([first for first, _ in numbers], np.int64) if self._has_types else lengths,
            part_text=part_text,
            part_piece=part_piece,
            tokens=tokens,
            truncated=truncated,
            errors=errors,
        )


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of both parts are kept: the longer one is cut to the shorter, then both to half the room.

    That is what the tokenizers library does (`truncate_encodings`, release 0.23), odd room included.
    """
    short, long = sorted((first, second))
    long = short if short > room else min(long, max(short, room - short))
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if first > second else (short, long)
