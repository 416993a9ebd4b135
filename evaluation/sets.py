"""Evaluation sets: pairs of texts with human similarity scores, in their published layouts."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.errors import InputError

FIRST = ("sentence1", "sentence_a", "sent1", "text1", "word1", "word 1", "phrase1")
SECOND = ("sentence2", "sentence_b", "sent2", "text2", "word2", "word 2", "phrase2")
SCORE = ("score", "relatedness_score", "simlex999", "human (mean)", "similarity", "average score")
"""Column names in header lines, lower-cased: of GLUE STS-B, SICK, SimLex-999, WordSim-353 and others."""

PART = "semeval_set"
"""SICK's column of parts. If a file has it, only the rows marked TEST count."""

ANNOTATOR = "annotator"
"""Multi-SimLex's per-language files have a column for each annotator's score; the score is their mean."""

TRANSLATIONS, SCORES = "translation.csv", "scores.csv"
"""Multi-SimLex's two files: columns `ENG 1`, `ENG 2` in the first and `ENG` in the second."""

MIN_PAIRS = 3

Rows = list[tuple[int, list[str]]]
"""Line number and fields of every line that is not blank."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Pairs of texts with human scores."""

    name: str  # the file's or folder's name, without suffix
    first: tuple[str, ...]  # one text of each pair
    second: tuple[str, ...]  # the other
    scores: NDArray[np.float64]  # float64 [pairs], higher is more similar; only their order counts
    skipped: int = 0  # pairs without a score, which are left out; the raw SemEval 2015 and 2016 files have some
    sha256: str  # of the file's bytes; for a folder, of its files' bytes in the order of their names

    def __post_init__(self) -> None:
        if len(self.scores) < MIN_PAIRS:
            raise InputError(
                f"evaluation set {self.name} has {len(self.scores)} scored pairs: at least {MIN_PAIRS} are needed"
            )
        if np.all(self.scores == self.scores[0]):
            raise InputError(f"evaluation set {self.name} scores every pair {self.scores[0]:g}: scores must differ")

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text, including repeats."""
        return self.first + self.second


def read_sets(path: str) -> tuple[EvaluationSet, ...]:
    """Read an evaluation set. The layout follows from file names and the header line.

    Supported layouts:
        a table with a header line that names two texts and a score (TAB or comma: STS-B of GLUE, SICK, SimLex-999,
            WordSim-353, a language of Multi-SimLex);
        the STS-B release without a header (score, then both sentences, from column 5);
        a table without a header, the score first or after the texts (TAB, comma, semicolon or spaces: RG-65, WordSim,
            SimVerb, MEN);
        a SentEval folder of `STS.input.*.txt` and `STS.gs.*.txt`, whose parts are joined;
        a Multi-SimLex folder; `FOLDER:ENG` selects one language.

    Raises:
        InputError: the set is malformed; the message names the file and the line.
    """
    if Path(path).is_dir():
        return _read_folder(Path(path), None)
    folder, _, language = path.rpartition(":")
    if folder and Path(folder).is_dir():
        return _read_folder(Path(folder), language)
    file = Path(path)
    data = _read_bytes(file)
    rows = _rows(file, data)
    first, second, scores, skipped = _pairs(file, rows)
    return (
        EvaluationSet(
            name=file.stem,
            first=first,
            second=second,
            scores=np.array(scores),
            skipped=skipped,
            sha256=hashlib.sha256(data).hexdigest(),
        ),
    )


def read_texts(path: str) -> list[str]:
    """Read the texts of an evaluation set, or the lines of a plain text file (no TAB in its first line, not `.csv`).

    Raises:
        InputError: the file cannot be read.
    """
    file = Path(path)
    if file.is_file() and file.suffix != ".csv":
        lines = [line for line in _decode(file, _read_bytes(file)).split("\n") if line.strip()]
        if not lines:
            raise InputError(f"{path} is empty: pass an evaluation set, or one sentence a line")
        if "\t" not in lines[0]:
            return [line.strip() for line in lines]
    return [text for found in read_sets(path) for text in found.texts]


def read_rows(path: Path) -> Rows:
    """Read a table with a header line: line number and fields of each line that is not blank.

    Raises:
        InputError: it cannot be read, or has no line below the header.
    """
    rows = _rows(path, _read_bytes(path))
    if len(rows) < 2:
        raise InputError(f"{path} is empty: it must have a header line and at least one line below")
    return rows


def check_fields(path: Path, rows: Rows) -> None:
    """Check that every line has as many fields as the header: a text must not be cut at a comma or space.

    Raises:
        InputError: a line has more or fewer; the message names it.
    """
    columns = len(rows[0][1])
    for number, fields in rows[1:]:
        if len(fields) != columns:
            raise InputError(
                f"{path}, line {number}: {len(fields)} fields where the header has {columns}: put one TAB between "
                "columns, in the header too, or quote texts that hold the separator"
            )


def _read_folder(folder: Path, language: str | None) -> tuple[EvaluationSet, ...]:
    if (folder / TRANSLATIONS).is_file():
        return _read_multi_simlex(folder, language)
    if language is not None:
        raise InputError(f"{folder} has no {TRANSLATIONS}: a language after the colon is for Multi-SimLex only")
    return (_read_senteval(folder),)


def _read_senteval(folder: Path) -> EvaluationSet:
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    skipped, digest = 0, hashlib.sha256()
    inputs = sorted(folder.glob("STS*.input.*.txt"))
    if not inputs:
        raise InputError(f"{folder} holds neither STS.input.*.txt nor {TRANSLATIONS}: pass an evaluation set")
    for path in inputs:
        gold = path.with_name(path.name.replace(".input.", ".gs."))
        texts, golds = (_read_bytes(file) for file in (path, gold))
        digest.update(texts + golds)
        lines, values = _decode(path, texts).rstrip("\n").split("\n"), _decode(gold, golds).rstrip("\n").split("\n")
        if len(lines) != len(values):
            raise InputError(f"{path} has {len(lines)} lines and {gold.name} {len(values)}: they must match")
        for number, (line, value) in enumerate(zip(lines, values, strict=True), 1):
            fields = line.split("\t")
            if not value.strip():
                skipped += 1
                continue
            if len(fields) < 2:
                raise InputError(f"{path}, line {number}: expected two sentences with a TAB between them")
            scores.append(_number(gold, number, value))
            first.append(fields[0].strip())
            second.append(fields[1].strip())
    return EvaluationSet(
        name=folder.resolve().name,
        first=tuple(first),
        second=tuple(second),
        scores=np.array(scores),
        skipped=skipped,
        sha256=digest.hexdigest(),
    )


def _read_multi_simlex(folder: Path, language: str | None) -> tuple[EvaluationSet, ...]:
    data = {name: _read_bytes(folder / name) for name in (TRANSLATIONS, SCORES)}
    words, scores = (_rows(folder / name, data[name]) for name in (TRANSLATIONS, SCORES))
    if len(words) != len(scores):
        raise InputError(f"{folder}: {TRANSLATIONS} has {len(words)} lines and {SCORES} {len(scores)}")
    columns = {name.strip(): i for i, name in enumerate(words[0][1])}
    score_columns = {name.strip(): i for i, name in enumerate(scores[0][1])}
    known = [name for name in score_columns if f"{name} 1" in columns and f"{name} 2" in columns]
    if not known or (language is not None and language not in known):
        raise InputError(f"{folder} has no language {language or ''}: it has {', '.join(known) or 'none'}")
    digest = hashlib.sha256(data[TRANSLATIONS] + data[SCORES]).hexdigest()
    sets = []
    for name in known if language is None else [language]:
        first, second = (
            tuple(_field(folder / TRANSLATIONS, row, columns[f"{name} {side}"]) for row in words[1:]) for side in (1, 2)
        )
        column = score_columns[name]
        values = [_number(folder / SCORES, row[0], _field(folder / SCORES, row, column)) for row in scores[1:]]
        sets.append(
            EvaluationSet(
                name=f"multisimlex-{name}", first=first, second=second, scores=np.array(values), sha256=digest
            )
        )
    return tuple(sets)


def _pairs(path: Path, rows: Rows) -> tuple[tuple[str, ...], tuple[str, ...], list[float], int]:
    if not rows:
        raise InputError(f"{path} is empty: pass an evaluation set")
    header = [field.strip().lower() for field in rows[0][1]]
    named = _named_columns(header)
    if named is None and not any(_is_number(field) for field in rows[0][1]):
        raise InputError(
            f"{path}, line 1: no number and no known header ({', '.join(rows[0][1][:8])}). Name the columns "
            f"{SCORE[0]}, {FIRST[0]} and {SECOND[0]}"
        )
    first_column, second_column, score_columns = named or _guessed_columns(path, rows[0])
    part = header.index(PART) if named and PART in header else None
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    skipped = 0
    for row in rows[1:] if named else rows:
        if part is not None and _field(path, row, part).upper() != "TEST":
            continue
        texts = _field(path, row, first_column), _field(path, row, second_column)
        values = [value for column in score_columns if (value := _field(path, row, column))]
        if not values:
            skipped += 1
            continue
        if not all(texts):
            raise InputError(f"{path}, line {row[0]}: a text is empty")
        scores.append(sum(_number(path, row[0], value) for value in values) / len(values))
        first.append(texts[0])
        second.append(texts[1])
    return tuple(first), tuple(second), scores, skipped


def _named_columns(header: Sequence[str]) -> tuple[int, int, list[int]] | None:
    """Find the columns of first text, second text and scores in a header line; None if one is missing."""

    def find(names: Sequence[str]) -> list[int]:
        return [header.index(name) for name in names if name in header][:1]

    first, second = find(FIRST), find(SECOND)
    scores = find(SCORE) or [i for i, name in enumerate(header) if name.startswith(ANNOTATOR)]
    return (first[0], second[0], scores) if first and second and scores else None


def _guessed_columns(path: Path, row: tuple[int, list[str]]) -> tuple[int, int, list[int]]:
    """Find the columns of a table without a header by the numbers in its first line; refuse ambiguous lines."""
    numeric = [_is_number(field) for field in row[1]]
    if len(numeric) >= 7 and numeric[4] and not numeric[5] and not numeric[6]:
        return 5, 6, [4]  # the STS-B release: genre, file, year, number, score, both sentences
    if len(numeric) >= 3 and not numeric[0] and not numeric[1] and any(numeric[2:]):
        return 0, 1, [numeric.index(True)]
    if len(numeric) >= 3 and numeric[0] and not numeric[1] and not numeric[2]:
        return 1, 2, [0]
    raise InputError(
        f"{path}, line {row[0]}: the columns of texts and score are ambiguous. Add a header line that names "
        f"{SCORE[0]}, {FIRST[0]} and {SECOND[0]}"
    )


def _rows(path: Path, data: bytes) -> Rows:
    text = _decode(path, data)
    top = next((line for line in text.split("\n") if line.strip()), "")
    if "\t" in top:  # quotes have no meaning in the published TAB-separated files
        return [(i, line.split("\t")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    delimiter = "," if "," in top else ";" if ";" in top else None
    if delimiter is None:
        return [(i, line.split()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, fields) for fields in reader if any(fields)]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error


def _field(path: Path, row: tuple[int, list[str]], column: int) -> str:
    number, fields = row
    if column >= len(fields):
        raise InputError(f"{path}, line {number}: {len(fields)} columns, expected at least {column + 1}")
    return fields[column].strip()


def _number(path: Path, line: int, value: str) -> float:
    if not _is_number(value):
        raise InputError(f"{path}, line {line}: the score must be a number: {value.strip()[:60]!r}")
    return float(value)


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"evaluation set {path} cannot be read: {error.strerror}") from error


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"evaluation set {path} is not UTF-8 in line {line}: convert it to UTF-8") from error
