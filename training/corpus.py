"""Read raw text: one sentence, phrase or word a line."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mirror_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The distinct lines of a text file.

    Attributes:
        texts: stripped, without repeats, in the file's order.
        lines: lines of the file, empty ones included.
        empty: lines with nothing but white space.
        duplicates: lines that repeat an earlier one.
        sha256: hash of the file's bytes.
    """

    texts: tuple[str, ...]
    lines: int
    empty: int
    duplicates: int
    sha256: str


def read_corpus(path: Path) -> Corpus:
    """Read a UTF-8 text file.

    Repeats are dropped: two equal lines in one batch would be pushed apart although they are the same.

    Raises:
        InputError: the file cannot be read, is no text, or has fewer than two distinct lines of two characters or more.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"corpus {path} cannot be read: {error.strerror}") from error
    if b"\0" in data:
        raise InputError(f"corpus {path} is not text: it holds NUL bytes. Give UTF-8 text, one sentence a line")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"corpus {path} is not UTF-8 in line {line}: convert it, for example with iconv") from error
    if lines[-1] == "":
        lines.pop()  # what follows the last newline is no line
    filled = [text for line in lines if (text := line.strip())]
    texts = tuple(dict.fromkeys(filled))
    if not texts:
        raise InputError(f"corpus {path} is empty: give UTF-8 text, one sentence a line")
    if len(texts) == 1:
        raise InputError(
            f"corpus {path} has one distinct line, and a text is learnt against others: give several hundred"
        )
    if all(len(text) == 1 for text in texts):
        raise InputError(f"corpus {path} has lines of one character only: give one sentence, phrase or word a line")
    return Corpus(
        texts=texts,
        lines=len(lines),
        empty=len(lines) - len(filled),
        duplicates=len(filled) - len(texts),
        sha256=hashlib.sha256(data).hexdigest(),
    )
