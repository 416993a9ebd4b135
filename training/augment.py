"""Make the two views of an example: of a text, by hiding a few characters (Mirror-BERT section 2.2); or of a pair."""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum
from typing import TypeAlias

Pair: TypeAlias = tuple[str, str]
"""Two texts that mean the same, for supervised tuning: they are the two views, and nothing is masked."""

Example: TypeAlias = str | Pair
"""What a run learns from: raw texts or pairs, never both in one corpus."""

MIN_CHARS = 30
"""Shorter texts are left whole, as the published code does: five characters of them would be too much."""


MIN_TOKENS = 5
"""Texts of fewer tokens of their own have none repeated: a word said twice would be most of the text."""


class MaskViews(str, Enum):
    """Which views lose characters."""

    SECOND = "second"
    """The published code's choice."""
    BOTH = "both"
    """Each view loses a span of its own."""


def mask_span(text: str, mask_token: str, length: int, rng: random.Random) -> str:
    """Replace a random span of characters by one mask token.

    Unlike in the published code (`mask_span_literally`), the span that was drawn is the one replaced, and it may lie
    at the very end.

    Args:
        text: the first view.
        mask_token: the tokenizer's own, such as "[MASK]".
        length: of the span in characters; 0 masks nothing.
        rng: decides where.
    """
    if length == 0 or len(text) < max(MIN_CHARS, length + 1):
        return text
    start = rng.randrange(len(text) - length + 1)
    return f"{text[:start]} {mask_token} {text[start + length :]}"


def mask_span_literally(text: str, length: int, rng: random.Random) -> str:
    """Replace characters as the published code does, quirks included.

    The start is never the last possible one; what is replaced is the first occurrence of the characters that were
    drawn; and "[MASK]" is written for every tokenizer, also one to which it is no mask token.

    Args:
        text: the first view.
        length: of the span in characters; 0 masks nothing.
        rng: decides where.
    """
    if length == 0 or len(text) < max(MIN_CHARS, length + 1):
        return text
    start = rng.randrange(len(text) - length)
    left, right = text.split(text[start : start + length], 1)
    return f"{left} [MASK] {right}"


def repeat_tokens(ids: Sequence[int], rate: float, limit: int, rng: random.Random) -> list[int]:
    """Double some of a text's tokens in place, so that its length says nothing (ESimCSE section 3.1).

    Two views of one text have one length, and views of different texts mostly have not: without this a model learns
    to tell texts apart by length.

    Args:
        ids: token ids with the special tokens around them, which are never doubled.
        rate: of n tokens between the special ones, 0 to max(2, rate * n) are doubled, each number equally likely.
        limit: a text that would become longer than this many tokens is left as it is.
        rng: decides how many and which.
    """
    own = len(ids) - 2
    if rate == 0 or own < MIN_TOKENS:
        return list(ids)
    count = rng.randint(0, min(own, max(2, int(rate * own))))
    doubled = set(rng.sample(range(1, own + 1), count))
    longer = [token for at, token in enumerate(ids) for _ in range(2 if at in doubled else 1)]
    return longer if len(longer) <= limit else list(ids)
