"""Contamination: the share of an evaluation set's texts in a corpus."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


class _Kept(dict[int, int | None]):
    """A `str.translate` table that removes punctuation and symbols, filled as characters occur."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PS" else code
        return self[code]


_KEPT = _Kept()


def normalise(text: str) -> str:
    """Normalise a text for comparison: case-folded, without punctuation, single spaces.

    A text of punctuation only is returned unchanged.
    """
    return " ".join(text.casefold().translate(_KEPT).split()) or text


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The texts that an evaluation file and a corpus share.

    Attributes:
        file: the evaluation file's name.
        texts: number of its distinct texts, normalised.
        found: number of them in the corpus.
    """

    file: str
    texts: int
    found: int

    @property
    def share(self) -> float:
        """`found` of `texts`, 0 to 1."""
        return self.found / max(1, self.texts)


class ContaminationCheck:
    """Looks for evaluation texts while a corpus is read.

    Args:
        files: each evaluation file's name and texts.
    """

    def __init__(self, files: Iterable[tuple[str, Iterable[str]]]) -> None:
        self._files = [(name, {normalise(text) for text in texts}) for name, texts in files]
        self._known: set[str] = set().union(*(texts for _, texts in self._files))
        self._found: set[str] = set()

    def matches(self, texts: Iterable[str]) -> bool:
        """Return whether any text of a record is an evaluation text, and count it."""
        found = self._known.intersection(map(normalise, texts)) if self._known else set()
        self._found |= found
        return bool(found)

    def overlaps(self) -> tuple[Overlap, ...]:
        """Return the overlaps so far, one for each file."""
        return tuple(
            Overlap(file=name, texts=len(texts), found=len(texts & self._found)) for name, texts in self._files
        )
