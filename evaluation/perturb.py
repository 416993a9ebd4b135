"""Changed forms of a text that keep its meaning, or a part of it."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping

CROPPED = 0.6
"""Share of its words that a cropped text keeps."""

MISSPELT = 0.5
"""Share of the words of four or more letters that get a typo."""


def crop(text: str, rng: random.Random) -> str:
    """Keep a random run of 60 % of the words, at least two."""
    words = text.split()
    size = min(len(words), max(2, round(CROPPED * len(words))))
    start = rng.randrange(len(words) - size + 1)
    return " ".join(words[start : start + size])


def misspell(text: str, rng: random.Random) -> str:
    """Swap, drop or replace one inner letter in half of the words of four or more letters."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) >= 4 and rng.random() < MISSPELT:
            at = rng.randrange(1, len(word) - 2)
            middle = rng.choice(
                (word[at + 1] + word[at], word[at + 1], rng.choice(string.ascii_lowercase) + word[at + 1])
            )
            words[i] = word[:at] + middle + word[at + 2 :]
    return " ".join(words)


def shuffle(text: str, rng: random.Random) -> str:
    """Put the words into random order."""
    words = text.split()
    return " ".join(rng.sample(words, len(words)))


def space(text: str, rng: random.Random) -> str:
    """Double some spaces, put tabs for others, and pad both ends."""
    return " " + "".join(rng.choice((" ", "  ", "\t")) if char == " " else char for char in text) + "\n"


PERTURBATIONS: Mapping[str, Callable[[str, random.Random], str]] = {
    "typos": misspell,
    "capitals": lambda text, rng: text.upper(),
    "white space": space,
    "word order": shuffle,
}
"""By the name that reports use."""
