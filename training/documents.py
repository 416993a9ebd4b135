"""Documents: texts of two parts, how files are split into them, and the views that a document is learnt by."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path

from mirror_runtime.corpus.files import CorpusFile, suffix_of
from mirror_runtime.errors import InputError
from training.augment import Document
from training.formats import Records, file_names
from training.labels import Labels

COLUMNS = ("title", "text")
"""Fields of a document in formats with columns."""

SUFFIXES = (".md", ".rst", ".txt")
"""The files of a folder that are read."""

MIN_WORDS = 4
"""A shorter text is not the body of a document, and a shorter sentence is not a view."""

CROPPED = (0.3, 0.6)
"""Least and largest share of the words that a crop keeps."""

_HEADING = re.compile(r" {0,3}#{1,6}\s+(.*?)\s*#*$")
_FENCE = re.compile(r"\s*(```|~~~)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])\s*(?=\S)")
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"\s*(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)")


class View(str, Enum):
    """What two views of a document are."""

    TITLE = "title"
    """The title, and the text."""
    CLOZE = "cloze"
    """A sentence, and the rest of title and text; in one of ten draws with the sentence (inverse cloze, Lee et al.
    2019)."""
    NEIGHBOUR = "neighbour"
    """A sentence and the next one."""
    CROPS = "crops"
    """Two random runs of 30 to 60 % of the words, which may overlap."""
    SPANS = "spans"
    """A short and a long run of words, whose shares are drawn from Beta(2, 4) and Beta(4, 2) (DeCLUTR)."""
    SAME = "same"
    """The text twice: dropout and the mask differ, as for lines of text."""


def words_of(text: str) -> list[str]:
    """Split a text into words, each with the space before it.

    In scripts that write none between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer), a character is a word.
    """
    return _WORD.findall(text)


def split_sentences(text: str) -> list[str]:
    """Split a text after full stops, question and exclamation marks; shorter parts join the sentence before."""
    found: list[str] = []
    for part in _SENTENCE_END.split(text):
        if found and len(words_of(part)) < MIN_WORDS:
            found[-1] += f" {part}"
        else:
            found.append(part)
    return found


def as_document(title: str, text: str) -> tuple[str, str]:
    """Return title and text; two empty strings where there are no two parts.

    Without a title, the first sentence is in its place. A text of fewer than `MIN_WORDS` words is not a part.
    """
    if not title:
        title, *rest = split_sentences(text)
        text = " ".join(rest)
    return (title, text) if title and len(words_of(text)) >= MIN_WORDS else ("", "")


class Documents:
    """Documents of a file or folder, as an iterable of `as_document`.

    Formats with columns have a title, which may be empty or lack, and a text; Markdown has a document under each
    heading; in other text files a blank line ends a document. A folder stands for all its Markdown and text files
    whose names do not begin with a dot or an underscore.

    Args:
        name: a path or pattern, or `hf:` and a data set's name.
        columns: of the title and the text, or of the text alone; empty means `title` and `text`.

    Raises:
        InputError: a folder without such files, or more columns.
    """

    labels: Labels | None = None

    def __init__(self, name: str, *, columns: Sequence[str] = ()) -> None:
        self.name = name
        if len(columns) > 2:
            raise InputError(
                f"--column names {len(columns)} columns: with --documents name title and text, or the text"
            )
        columns = tuple(columns) or COLUMNS
        plain = [Records(one) for one in file_names(name, SUFFIXES)]
        self._sources = [
            Records(one.name, pairs=len(columns) == 2, columns=columns) if one.has_columns else one for one in plain
        ]
        self.has_columns = any(one.has_columns for one in plain)

    @property
    def sha256(self) -> str:
        """Hash of the file, or of the hashes of a folder's files; final after all documents were read."""
        hashes = [source.sha256 for source in self._sources]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Read from the start.

        Raises:
            InputError: a record is malformed, see `Records`.
        """
        for source in self._sources:
            if source.has_columns:
                parts: Iterator[tuple[str, ...]] = (("", *record)[-2:] for record in source)
            else:
                path = Path(source.name)
                lines = (row.values[0].rstrip() for row in CorpusFile(path=path).rows())
                parts = _sections(lines) if suffix_of(path) == ".md" else _blocks(map(str.strip, lines))
            yield from (as_document(title, text) for title, text in parts)


def _blocks(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    block: list[str] = []
    for line in lines:
        if line:
            block.append(line)
        elif block:
            yield "", " ".join(block)
            block = []
    if block:
        yield "", " ".join(block)


def _sections(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield the headings of Markdown with the text under each, without code."""
    title, body, fence = "", list[str](), ""
    for line in lines:
        if mark := _FENCE.match(line):
            fence = "" if fence == mark[1] else fence or mark[1]
        elif not fence and (heading := _HEADING.match(line)):
            if body:
                yield title, " ".join(body)
            title, body = heading[1], []
        elif not fence and line:
            body.append(line.strip())
    if body:
        yield title, " ".join(body)


def _cloze(document: Document, rng: random.Random) -> tuple[str, str]:
    sentences = split_sentences(document.text)
    chosen = rng.randrange(len(sentences))
    rest = [one for i, one in enumerate(sentences) if i != chosen or rng.random() < 0.1]
    return sentences[chosen], " ".join([document.title, *rest])


def _neighbour(document: Document, rng: random.Random) -> tuple[str, str]:
    sentences = [document.title, *split_sentences(document.text)]
    first = rng.randrange(len(sentences) - 1)
    return sentences[first], sentences[first + 1]


def _run(words: Sequence[str], share: float, rng: random.Random) -> str:
    size = min(len(words), max(MIN_WORDS, round(share * len(words))))
    start = rng.randrange(len(words) - size + 1)
    return "".join(words[start : start + size]).strip()


def _crops(document: Document, rng: random.Random) -> tuple[str, str]:
    words = words_of(document.text)
    return _run(words, rng.uniform(*CROPPED), rng), _run(words, rng.uniform(*CROPPED), rng)


def _spans(document: Document, rng: random.Random) -> tuple[str, str]:
    words = words_of(document.text)
    return _run(words, rng.betavariate(2, 4), rng), _run(words, rng.betavariate(4, 2), rng)


VIEWS: Mapping[View, Callable[[Document, random.Random], tuple[str, str]]] = {
    View.TITLE: lambda document, rng: (document.title, document.text),
    View.CLOZE: _cloze,
    View.NEIGHBOUR: _neighbour,
    View.CROPS: _crops,
    View.SPANS: _spans,
    View.SAME: lambda document, rng: (document.text, document.text),
}


def draw_views(document: Document, views: Sequence[View], rng: random.Random) -> tuple[str, str]:
    """Return the views of a document: of one kind, drawn from several."""
    return VIEWS[rng.choice(views)](document, rng)
