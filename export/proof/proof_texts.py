"""The texts that a graph is proven with: ragged, real, the same in every run, edge cases included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirror_runtime.errors import InputError
from mirror_runtime.stdlib_texts import standard_library

EDGE_CASES = (
    "",
    " ",
    "\t\n",
    ".",
    "😀",
    "👩‍👩‍👧‍👦 und 🇯🇵: naïve café, Ångström, œuvre",
    "nul\x00inside and \x07 bell",
    "東京タワーは高さ333メートルです。",
    "Привет, мир! שלום עולם. مرحبا بالعالم",
    "e\u0301 is é, and \ufeffa byte order mark",
    "supercalifragilisticexpialidocious" * 20,
    "[CLS] [SEP] [PAD] [MASK] are words here",
    "word " * 20_000,
)
"""Empty, whitespace, emoji, NUL, several scripts, an endless word, special tokens spelt out, 100,000 characters."""

CANARIES = (
    "The house is warm.",
    "",
    "emoji 🤖 and 漢字",
    "A man is playing a guitar on stage.",
    "Someone on a stage plays an instrument with six strings.",
    "delete a folder and everything in it",
    "Return the absolute value of the argument.",
    "word " * 40,
    " ".join(f"Sentence {i} of this long text says that {i} times {i} is {i * i}." for i in range(1, 61)),
)
"""Texts whose vectors are stored in the bundle; most encoders truncate the last."""


def parity_texts(short: int = 500, medium: int = 40, long: int = 8) -> tuple[str, ...]:
    """Return `short` first sentences and whole docstrings of this Python's standard library, and `EDGE_CASES`.

    The `medium` docstrings have 200 to 800 characters, the `long` ones more than 2,500, which most encoders truncate.
    """
    documented = standard_library()
    whole = list(dict.fromkeys(item.text for item in documented))
    texts = [
        *_spread(list(dict.fromkeys(item.summary for item in documented if item.summary)), short),
        *_spread([text for text in whole if 200 <= len(text) <= 800], medium),
        *_spread([text for text in whole if len(text) > 2500], long),
        *EDGE_CASES,
    ]
    return tuple(dict.fromkeys(texts))


def read_texts(path: Path) -> tuple[str, ...]:
    """Read a UTF-8 file with one text per line, without its empty lines.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or contains no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Pass a text file with one text per line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    texts = tuple(line for line in content.split("\n") if line.strip())
    if not texts:
        raise InputError(f"{path} contains no text: it must have one text per line")
    return texts


def _spread(items: Sequence[str], count: int) -> list[str]:
    """Return `count` items at even distances, or all if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
