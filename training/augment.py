"""The views of an example: a text with masked characters (Mirror-BERT section 2.2) or repeated tokens, or a pair."""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, TypeAlias


class Document(NamedTuple):
    """A document with a title, or its first sentence in the title's place; both parts have text."""

    title: str
    text: str


class Scored(NamedTuple):
    """Two texts, and how similar they are: only the order of scores counts."""

    first: str
    second: str
    score: float


Example: TypeAlias = str | tuple[str, ...] | Document | Scored
"""One item of a corpus, which has one kind: a text; two texts with the same meaning, and any number that differ from
the first in meaning (hard negatives); a document; or a scored pair. Only single texts get two views by masking."""

MIN_CHARS = 30
"""Shorter texts are not masked, as in the published code: five characters would be too large a part."""

MIN_TOKENS = 5
"""In texts with fewer tokens, special ones excluded, no token is repeated: it would be too large a part."""


class MaskViews(str, Enum):
    """Which views are masked."""

    SECOND = "second"
    """As in the published code."""
    BOTH = "both"
    """Each view with its own span."""


def texts_of(example: Example) -> tuple[str, ...]:
    """Return an example's texts: one, two, or two and their hard negatives."""
    if isinstance(example, str):
        return (example,)
    return example[:2] if isinstance(example, Scored) else example


def mask_span(text: str, mask_token: str, length: int, rng: random.Random) -> str:
    """Replace a random span of characters by one mask token.

    Unlike in the published code (`mask_span_literally`), the replaced span is always the drawn one, and it may lie at
    the very end. A `length` of 0 masks nothing.
    """
    if length == 0 or len(text) < max(MIN_CHARS, length + 1):
        return text
    start = rng.randrange(len(text) - length + 1)
    return f"{text[:start]} {mask_token} {text[start + length :]}"


def mask_span_literally(text: str, length: int, rng: random.Random) -> str:
    """Mask characters as the published code does, including its quirks.

    The last possible start is never drawn; the first occurrence of the drawn characters is replaced; and "[MASK]" is
    written for every tokenizer, even if it is not its mask token.
    """
    if length == 0 or len(text) < max(MIN_CHARS, length + 1):
        return text
    start = rng.randrange(len(text) - length)
    left, right = text.split(text[start : start + length], 1)
    return f"{left} [MASK] {right}"


def repeat_tokens(ids: Sequence[int], rate: float, limit: int, rng: random.Random) -> list[int]:
    """Double some of a text's tokens in place, so that its length does not identify it (ESimCSE section 3.1).

    The two views of a text have the same length, and views of different texts mostly differ in length: without this a
    model learns to distinguish texts by length.

    Of n tokens between the special ones at both ends, 0 to max(2, rate * n) are doubled, each number equally likely. A
    text that would become longer than `limit` tokens is returned unchanged.
    """
    inner = len(ids) - 2
    if rate == 0 or inner < MIN_TOKENS:
        return list(ids)
    count = rng.randint(0, min(inner, max(2, int(rate * inner))))
    doubled = set(rng.sample(range(1, inner + 1), count))
    longer = [token for at, token in enumerate(ids) for _ in range(2 if at in doubled else 1)]
    return longer if len(longer) <= limit else list(ids)
