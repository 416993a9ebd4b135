"""The corpus of a run: read, without duplicates and evaluation texts, sampled, and described."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from evaluation.sets import read_texts
from mirror_runtime.errors import InputError
from training.augment import Example
from training.contamination import ContaminationCheck, Overlap
from training.formats import Records

MEASURED_TEXTS = 50_000
"""Maximum texts of the length report, evenly spaced: tokenising millions would take minutes."""


@dataclass(frozen=True, kw_only=True)
class CorpusRequest:
    """The corpus to read.

    Attributes:
        files: paths or `hf:` names, see `Records`.
        pairs: records are pairs of texts with the same meaning.
        columns: of JSON lines, Parquet and data sets.
        sample: number of distinct records to draw at random; None keeps all.
        seed: of the sample.
        exclude: evaluation sets, or files of lines, whose texts are left out.
    """

    files: tuple[str, ...]
    pairs: bool = False
    columns: tuple[str, ...] = ()
    sample: int | None = None
    seed: int = 42
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FileCounts:
    """Counts of one corpus file.

    Attributes:
        name: without its folder.
        sha256: of its bytes, or of a data set's texts.
        lines: lines or rows, including empty ones.
        empty: lines of white space only.
        duplicates: lines that repeat an earlier one of this or an earlier file.
        excluded: lines that contain an evaluation text.
    """

    name: str
    sha256: str
    lines: int
    empty: int
    duplicates: int
    excluded: int


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Distinct texts, or distinct pairs of texts.

    Attributes:
        examples: stripped, without duplicates, in the order of the files.
        files: counts of each file.
        overlaps: texts that were left out, one entry for each `exclude` file.
        sampled_from: number of distinct records before sampling; None if all were kept.
        sha256: of the examples (TAB between partners), a newline after each.
    """

    examples: tuple[Example, ...]
    files: tuple[FileCounts, ...]
    overlaps: tuple[Overlap, ...] = ()
    sampled_from: int | None = None
    sha256: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text; both of a pair."""
        return tuple(text for one in self.examples for text in ((one,) if isinstance(one, str) else one))

    @property
    def has_pairs(self) -> bool:
        """Whether the examples are pairs."""
        return not isinstance(self.examples[0], str)

    @property
    def lines(self) -> int:
        """Lines of all files."""
        return sum(file.lines for file in self.files)

    @property
    def empty(self) -> int:
        """Empty lines of all files."""
        return sum(file.empty for file in self.files)

    @property
    def duplicates(self) -> int:
        """Duplicates in all files."""
        return sum(file.duplicates for file in self.files)

    @property
    def excluded(self) -> int:
        """Lines left out because they contain an evaluation text."""
        return sum(file.excluded for file in self.files)

    def overlap_with(self, files: Sequence[tuple[str, Sequence[str]]]) -> tuple[Overlap, ...]:
        """Look for evaluation texts in the examples.

        Args:
            files: each evaluation set's name and texts.
        """
        check = ContaminationCheck(files)
        check.matches(self.texts)
        return check.overlaps()


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of texts in tokens, including special tokens.

    Attributes:
        texts: number of measured texts.
        p50: the median.
        p95: the 95th percentile.
        max: the longest.
        over: share of texts longer than `max_tokens`, 0 to 1, which are truncated while tuning.
        max_tokens: the recipe's limit.
    """

    texts: int
    p50: int
    p95: int
    max: int
    over: float
    max_tokens: int


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
    sources = [Records(name, pairs=request.pairs, columns=request.columns) for name in request.files]
    if request.columns and not any(source.has_columns for source in sources):
        raise InputError("--column is for JSON lines, Parquet and data sets, and the corpus is plain text: drop it")
    excluded = ContaminationCheck((Path(name).name, read_texts(name)) for name in request.exclude)
    sample = _Sample(request.sample, request.seed)
    known: set[int] = set()
    files = tuple(_read_file(source, excluded, sample, known) for source in sources)
    records = sample.records()
    _check(request, files, sample.offered, records)
    digest = hashlib.sha256()
    for record in records:
        digest.update("\t".join(record).encode() + b"\n")
    return Corpus(
        examples=tuple((record[0], record[1]) if request.pairs else record[0] for record in records),
        files=files,
        overlaps=excluded.overlaps(),
        sampled_from=sample.offered if len(records) < sample.offered else None,
        sha256=digest.hexdigest(),
    )


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


def _read_file(source: Records, excluded_texts: ContaminationCheck, sample: _Sample, known: set[int]) -> FileCounts:
    lines = empty = duplicates = excluded = 0
    for record in source:
        lines += 1
        if not all(record):
            if any(record):
                raise InputError(f"corpus {source.name}, row {lines}: one text of the pair is empty")
            empty += 1
            continue
        key = int.from_bytes(hashlib.blake2b("\t".join(record).encode(), digest_size=8).digest(), "little")
        if key in known:
            duplicates += 1
            continue
        known.add(key)
        if excluded_texts.matches(record):
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


def _check(
    request: CorpusRequest, files: Sequence[FileCounts], distinct: int, records: Sequence[tuple[str, ...]]
) -> None:
    name, what = ", ".join(request.files), "pair" if request.pairs else "line"
    excluded = sum(file.excluded for file in files)
    if distinct < 2 and excluded:
        raise InputError(f"corpus {name}: {excluded} of {excluded + distinct} distinct {what}s are in --exclude files")
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
