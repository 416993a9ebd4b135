"""The texts to encode: a file's lines, or the first sentences of the standard library's docstrings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import exp, log
from pathlib import Path
from typing import TypeAlias

import numpy as np

from mirror_runtime.bundle import sha256_texts
from mirror_runtime.errors import InputError
from mirror_runtime.stdlib_texts import standard_library
from mirror_runtime.tokenizer import LongTexts, Tokenized, Tokenizer

FULL_TEXTS = 4000
QUICK_TEXTS = 300

DRAWS_A_TOKEN = 20
"""Random words drawn for each token of a text before giving up: most do not fit when little room is left."""

Tokenize: TypeAlias = Callable[[Sequence[object]], Tokenized]


class Shape(str, Enum):
    """How a workload's words are cut into texts."""

    LINES = "lines"  # unchanged, one text per line
    PASSAGES = "passages"  # uniformly distributed lengths
    MIXED = "mixed"  # uniformly on a logarithmic scale: most are short


_BOUNDS = {Shape.PASSAGES: (96, 256), Shape.MIXED: (5, 500)}
"""Tokens of the shortest and the longest text."""


@dataclass(frozen=True, kw_only=True)
class WorkloadFacts:
    """What a report states about the texts. Token counts include special tokens, after truncation to the limit."""

    source: str
    texts: int
    distinct: int  # by their tokens: the runtime computes equal ones of a window once
    texts_sha256: str
    tokens_mean: float
    tokens_p50: float
    tokens_p90: float
    tokens_max: int
    truncated: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Texts and what a report states about them."""

    texts: tuple[str, ...]
    facts: WorkloadFacts


def load_workload(
    path: Path | None, tokenizer: Tokenizer, *, quick: bool, seed: int, shape: Shape = Shape.LINES
) -> Workload:
    """Read a workload from a UTF-8 file with one text per line, or collect it from the standard library.

    A quick run takes a seeded sample of at most `QUICK_TEXTS` texts; otherwise a file is used whole, in its own order,
    and docstrings up to `FULL_TEXTS`. The tokenizer is the bundle's, with the policy truncate. A file that cannot be
    read or has no text is an `InputError`.
    """
    if path is None:
        # The first sentences, sorted, without repeats; those of fewer than three words are left out.
        texts = sorted({item.summary for item in standard_library() if len(item.summary.split()) >= 3})
        random.Random(seed).shuffle(texts)
        texts = texts[: QUICK_TEXTS if quick else FULL_TEXTS]
        source = "first sentences of the Python standard library's docstrings"
    else:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--texts {path} cannot be read as UTF-8 text: {error}") from error
        texts, source = [text for line in lines if (text := line.rstrip("\r")).strip()], path.name
        if not texts:
            raise InputError(f"--texts {path} has no text: it needs one text per line")
        if quick and len(texts) > QUICK_TEXTS:
            texts = random.Random(seed).sample(texts, QUICK_TEXTS)
            source += f", a sample of {QUICK_TEXTS} lines"
    if shape is not Shape.LINES:
        shortest, longest = _BOUNDS[shape]
        source += f", its words as texts of {shortest} to {longest} tokens"
        texts = _reshape(texts, tokenizer, shape, seed)
    return Workload(texts=tuple(texts), facts=_describe(texts, source, tokenizer))


def texts_of_length(texts: Sequence[str], tokenizer: Tokenize, tokens: int, *, count: int, seed: int) -> list[str]:
    """Build distinct texts of exactly `tokens` tokens, special tokens included, or raise an `InputError`."""
    known, special = _word_sizes(texts, tokenizer)
    words = sorted(known.items())
    made: dict[str, None] = {}
    chosen: list[str] = []
    room = tokens - special
    draw = random.Random(seed)
    for _ in range(DRAWS_A_TOKEN * tokens * count):
        word, size = draw.choice(words)
        if 0 < size <= room:
            chosen.append(word)
            room -= size
        if room == 0:
            made[" ".join(chosen)] = None
            chosen, room = [], tokens - special
            if len(made) == count:
                break
    lengths = tokenizer(list(made)).tokens.tolist()
    exact = [text for text, length in zip(made, lengths, strict=True) if length == tokens]
    if len(exact) < count:
        raise InputError(
            f"the workload's {len(words)} words make {len(exact)} texts of exactly {tokens} tokens, but {count} are "
            "needed: use a --texts file with more words"
        )
    return exact


def _reshape(texts: Sequence[str], tokenizer: Tokenize, shape: Shape, seed: int) -> list[str]:
    """Cut the texts' words, in their order, into texts of random lengths; each word is used once.

    A text has the drawn number of tokens, special tokens included, or a few more where its last word exceeds it.
    """
    shortest, longest = _BOUNDS[shape]
    draw = random.Random(seed)
    tokens, special = _word_sizes(texts, tokenizer)
    made: list[str] = []
    chosen: list[str] = []
    for word in (word for text in texts for word in text.split()):
        if not chosen:
            passage = shape is Shape.PASSAGES
            length = draw.randint(shortest, longest) if passage else exp(draw.uniform(log(shortest), log(longest)))
            room = round(length) - special
        chosen.append(word)
        room -= tokens[word]
        if room <= 0:
            made.append(" ".join(chosen))
            chosen = []
    return made or [" ".join(chosen)]


def _word_sizes(texts: Sequence[str], tokenizer: Tokenize) -> tuple[dict[str, int], int]:
    """Return the tokens that each word adds to a text, and the special tokens of a text."""
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    sizes = tokenizer(["", *words]).tokens
    return dict(zip(words, (sizes[1:] - sizes[0]).tolist(), strict=True)), int(sizes[0])


def _describe(texts: Sequence[str], source: str, tokenizer: Tokenizer) -> WorkloadFacts:
    tokenized = tokenizer(texts)
    if tokenized.errors:
        raise InputError(f"the workload ({source}) has an invalid text: {next(iter(tokenized.errors.values()))}")
    lengths = [float(length) for length in tokenized.lengths[tokenized.part_piece]]  # truncated: a text is one part
    return WorkloadFacts(
        source=source, texts=len(texts), distinct=tokenized.lengths.size, texts_sha256=sha256_texts(texts),
        tokens_mean=sum(lengths) / len(lengths), tokens_p50=float(np.percentile(lengths, 50)),
        tokens_p90=float(np.percentile(lengths, 90)), tokens_max=int(max(lengths)),
        truncated=int(tokenized.truncated.sum()),
    )  # fmt: skip


def bundle_tokenizer(path: Path, max_tokens: int) -> Tokenizer:
    """Open a bundle's tokenizer the way its encoder does by default: long texts are truncated."""
    return Tokenizer(path, max_tokens, LongTexts.TRUNCATE)
