"""The corpus of a run: read, without duplicates and evaluation texts, sampled, and described."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.sets import read_texts
from mirror_runtime.errors import InputError
from training.augment import Document, Example, Scored, texts_of
from training.documents import Documents, split_sentences
from training.formats import Records, file_names
from training.labels import Labels, contradictions, example_of, labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED_TEXTS = 50_000
"""Maximum texts of the length report, evenly spaced: tokenising millions would take minutes."""


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
    """The texts that an evaluation file and a corpus share."""

    file: str  # the evaluation file's name
    texts: int  # number of its distinct texts, normalised
    found: int  # number of them in the corpus

    @property
    def share(self) -> float:
        """`found` of `texts`, 0 to 1."""
        return self.found / max(1, self.texts)


class ContaminationCheck:
    """Looks for the texts of evaluation files, given with their names, while a corpus is read."""

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


@dataclass(frozen=True, kw_only=True)
class CorpusRequest:
    """The corpus to read."""

    files: tuple[str, ...]  # paths or `hf:` names, see `Records`
    pairs: bool = False  # records are pairs of texts with the same meaning
    documents: bool = False  # records are documents of two parts, see `Documents`
    labels: Labels | None = None  # records are labelled
    columns: tuple[str, ...] = ()  # of JSON lines, Parquet and data sets
    sample: int | None = None  # number of distinct records to draw at random; None keeps all
    seed: int = 42  # of the sample
    exclude: tuple[str, ...] = ()  # evaluation sets, or files of lines, whose texts are left out


@dataclass(frozen=True, kw_only=True)
class FileCounts:
    """Counts of one corpus file."""

    name: str  # without its folder
    sha256: str  # of its bytes, or of a data set's texts
    lines: int  # lines or rows, including empty ones
    empty: int  # lines of white space only, documents of one part, rows without a label
    duplicates: int  # lines that repeat an earlier one of this or an earlier file
    excluded: int  # lines that contain an evaluation text


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Distinct texts, pairs of texts, documents or labelled records."""

    examples: tuple[Example, ...]  # stripped, without duplicates, in the order of the files
    files: tuple[FileCounts, ...]
    overlaps: tuple[Overlap, ...] = ()  # texts that were left out, one entry for each `exclude` file
    sampled_from: int | None = None  # number of distinct records before sampling; None if all were kept
    sha256: str  # of the examples (TAB between partners), a newline after each

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text; both of a pair or document."""
        return tuple(text for one in self.examples for text in texts_of(one))

    @property
    def records(self) -> list[tuple[str, ...]]:
        """The examples as tuples of one text, or of two."""
        return [texts_of(one)[:2] for one in self.examples]

    @property
    def has_pairs(self) -> bool:
        """Whether the examples are pairs."""
        return not isinstance(self.examples[0], (str, Document))

    @property
    def has_documents(self) -> bool:
        """Whether the examples are documents."""
        return isinstance(self.examples[0], Document)

    @property
    def unit(self) -> str:
        """The word for an example."""
        kinds = {"document": self.has_documents, "scored pair": self.has_scores, "pair": self.has_pairs}
        return next((name for name, has in kinds.items() if has), "line")

    @property
    def has_scores(self) -> bool:
        """Whether the examples are scored pairs."""
        return isinstance(self.examples[0], Scored)

    @property
    def counts(self) -> dict[str, int]:
        """The sums of the files' counts."""
        names = ("lines", "empty", "duplicates", "excluded")
        return {name: sum(getattr(file, name) for file in self.files) for name in names}

    def overlap_with(self, files: Sequence[tuple[str, Sequence[str]]]) -> tuple[Overlap, ...]:
        """Look for the texts of evaluation sets, given with their names, in the examples."""
        check = ContaminationCheck(files)
        check.matches(chain.from_iterable(_compared(texts_of(one), self.has_documents) for one in self.examples))
        return check.overlaps()


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of texts in tokens, including special tokens."""

    texts: int
    p50: int
    p95: int
    max: int
    over: float  # share of texts longer than `max_tokens`, 0 to 1, which are truncated while tuning
    max_tokens: int  # the recipe's limit


def read_corpus(request: CorpusRequest) -> Corpus:
    """Read text files, data sets, or pairs.

    Duplicates are dropped: two equal lines in one batch would be pushed apart although they are the same. The files are
    streamed; memory holds the kept records and an 8-byte hash of every distinct one.

    Raises:
        InputError: a file cannot be read or is not text, fewer than two distinct records are left, or all have one
            character.
    """
    if not request.files:
        raise InputError("no corpus: pass at least one file")
    if request.documents and (request.pairs or request.labels):
        raise InputError("--documents is one kind of corpus, and pairs and labels are others: pass one of them")
    sources: list[Documents | Records] = [
        *(Documents(name, columns=request.columns) for name in request.files if request.documents),
        *(
            Records(found, pairs=request.pairs, columns=request.columns, labels=request.labels)
            for name in request.files
            if not request.documents
            for found in file_names(name)
        ),
    ]
    if request.columns and not any(source.has_columns for source in sources):
        raise InputError("--column is for files with columns and data sets, and the corpus is plain text: drop it")
    excluded = ContaminationCheck((Path(name).name, read_texts(name)) for name in request.exclude)
    sample = _Sample(request.sample, request.seed)
    known: set[int] = set()
    contradicted = contradictions(sources) if request.labels is Labels.ENTAILMENT else {}
    files = tuple(_read_file(source, excluded, sample, known, contradicted) for source in sources)
    records = sample.records()
    _check(request, files, sample.offered, records)
    examples = tuple(
        Document(*record) if request.documents else example_of(request.labels, record) for record in records
    )
    return Corpus(
        examples=examples,
        files=files,
        overlaps=excluded.overlaps(),
        sampled_from=sample.offered if len(records) < sample.offered else None,
        sha256=digest(examples),
    )


def digest(examples: Iterable[Example]) -> str:
    """Return the sha256 of examples, TAB between their parts, a newline after each."""
    found = hashlib.sha256()
    for example in examples:
        found.update("\t".join([example] if isinstance(example, str) else map(str, example)).encode() + b"\n")
    return found.hexdigest()


def measure_lengths(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Lengths:
    """Measure the lengths of the corpus' texts."""
    texts = corpus.texts
    texts = texts[:: -(-len(texts) // MEASURED_TEXTS)]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    counts = np.array([len(encoding.ids) for encoding in backend.encode_batch_fast(texts)])
    p50, p95 = np.percentile(counts, [50, 95], method="inverted_cdf")
    return Lengths(
        texts=len(texts),
        p50=int(p50),
        p95=int(p95),
        max=int(counts.max()),
        over=float((counts > max_tokens).mean()),
        max_tokens=max_tokens,
    )


class _Sample:
    """A uniform sample of a stream of unknown length (algorithm R), or all of it."""

    def __init__(self, size: int | None, seed: int) -> None:
        if size is not None and size < 2:
            raise InputError(
                f"--sample is {size}: it must be at least one batch, since texts are learnt against others"
            )
        self._size = size
        self._rng = random.Random(seed)
        self._kept: list[tuple[int, tuple[str, ...]]] = []
        self.offered = 0

    def offer(self, record: tuple[str, ...]) -> None:
        if self._size is None or self.offered < self._size:
            self._kept.append((self.offered, record))
        elif (slot := self._rng.randrange(self.offered + 1)) < self._size:
            self._kept[slot] = (self.offered, record)
        self.offered += 1

    def records(self) -> list[tuple[str, ...]]:
        return [record for _, record in sorted(self._kept)]


def _read_file(
    source: Records | Documents,
    excluded_texts: ContaminationCheck,
    sample: _Sample,
    known: set[int],
    contradicted: Mapping[str, Sequence[str]],
) -> FileCounts:
    lines = empty = duplicates = excluded = 0
    for record in labelled(source.labels, source, source.name, contradicted):
        lines += 1
        if not all(record):
            if any(record):
                raise InputError(f"corpus {source.name}, row {lines}: one text of the example is empty")
            empty += 1
            continue
        key = int.from_bytes(hashlib.blake2b("\t".join(record).encode(), digest_size=8).digest(), "little")
        if key in known:
            duplicates += 1
            continue
        known.add(key)
        texts = record[:2] if source.labels is Labels.SCORES else record
        if excluded_texts.matches(_compared(texts, isinstance(source, Documents))):
            excluded += 1
            continue
        sample.offer(record)
    return FileCounts(
        name=Path(source.name).name,
        sha256=source.sha256,
        lines=lines,
        empty=empty,
        duplicates=duplicates,
        excluded=excluded,
    )


def _compared(texts: tuple[str, ...], document: bool) -> Iterator[str]:
    """Yield what is compared with evaluation texts: of a document also its sentences, which views may be."""
    yield from texts
    if document:
        yield from split_sentences(texts[-1])


def _check(
    request: CorpusRequest, files: Sequence[FileCounts], distinct: int, records: Sequence[tuple[str, ...]]
) -> None:
    name = ", ".join(request.files)
    what = "document" if request.documents else "pair" if request.pairs else "line"
    excluded = sum(file.excluded for file in files)
    if distinct < 2 and excluded:
        raise InputError(f"corpus {name}: {excluded} of {excluded + distinct} distinct {what}s are in --exclude files")
    if not distinct and request.documents:
        raise InputError(f"corpus {name} has no document with a title and a text, or with two sentences")
    if not distinct:
        raise InputError(f"corpus {name} is empty: it must be UTF-8 text, one sentence a line")
    if distinct == 1:
        raise InputError(
            f"corpus {name} has one distinct {what}, and texts are learnt against others: pass several hundred"
        )
    if all(len(text) == 1 for record in records for text in record):
        raise InputError(
            f"corpus {name} has lines of one character only: it must have a sentence, phrase or word a line"
        )
