"""How much of an evaluation set's text is in a corpus: what was tuned on its own test sentences must say so."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


class _Kept(dict[int, int | None]):
    """A `str.translate` table without punctuation and symbols, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PS" else code
        return self[code]


_KEPT = _Kept()


def normalise(text: str) -> str:
    """Give the form in which texts are compared: case-folded, without punctuation, single spaces.

    A text of nothing but punctuation stays as it is.
    """
    return " ".join(text.casefold().translate(_KEPT).split()) or text


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What one evaluation file and a corpus share.

    Attributes:
        file: the evaluation file's name.
        texts: its distinct texts, in normalised form.
        found: how many of them are in the corpus.
    """

    file: str
    texts: int
    found: int

    @property
    def share(self) -> float:
        """`found` of `texts`, 0 to 1."""
        return self.found / max(1, self.texts)


class ContaminationCheck:
    """Evaluation texts to look for while a corpus goes by.

    Args:
        files: each evaluation file's name and texts.
    """

    def __init__(self, files: Iterable[tuple[str, Iterable[str]]]) -> None:
        self._files = [(name, {normalise(text) for text in texts}) for name, texts in files]
        self._known: set[str] = set().union(*(texts for _, texts in self._files))
        self._seen: set[str] = set()

    def meets(self, texts: Iterable[str]) -> bool:
        """Note the texts of one record, and say whether any of them is an evaluation text."""
        met = self._known.intersection(map(normalise, texts)) if self._known else set()
        self._seen |= met
        return bool(met)

    def overlaps(self) -> tuple[Overlap, ...]:
        """Give what was met so far, one entry a file."""
        return tuple(Overlap(file=name, texts=len(texts), found=len(texts & self._seen)) for name, texts in self._files)
