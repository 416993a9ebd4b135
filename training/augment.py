"""Make the second view of a text: the same text with a few characters hidden (Mirror-BERT section 2.2)."""

from __future__ import annotations

import random

MIN_CHARS = 30
"""Shorter texts are left whole, as the published code does: five characters of them would be too much."""


def mask_span(text: str, mask_token: str, length: int, rng: random.Random) -> str:
    """Replace a random span of characters by one mask token.

    Unlike the published code, the span that was drawn is the one replaced (there it is the first occurrence of the same
    characters), and it may lie at the very end.

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
