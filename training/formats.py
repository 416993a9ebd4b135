"""Records to tune on: texts or pairs from corpus files, and from data sets by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mirror_runtime.bundle import sha256_file
from mirror_runtime.corpus.corpus import find_files
from mirror_runtime.corpus.files import STDIN, CorpusFile, Format, suffix_of
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.tokenizer import validate_text
from training.labels import COLUMNS, Labels

HUB = "hf:"
"""Prefix of a data set's name: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`."""

TEXT_COLUMNS = ("text",)
PAIR_COLUMNS = ("text1", "text2")


class Records:
    """One corpus file as an iterable of records: tuples of one text, or of two if `pairs` is set.

    Texts are stripped; an empty line or a missing value becomes empty texts.

    Args:
        name: a path (see `CorpusFile`), or `hf:` and a data set's name.
        pairs: two texts a record: in two columns, or separated by one TAB in a text file or a `.tsv` without `columns`.
        columns: to read; empty means `text`, `text1` and `text2`, or those of the labels.
        labels: records are the columns of a labelled file, see `training.labels`; numbers become their text, and a
            list in the last column its items.
    """

    def __init__(
        self, name: str, *, pairs: bool = False, columns: Sequence[str] = (), labels: Labels | None = None
    ) -> None:
        self.name = name
        self.pairs = pairs
        self.labels = labels
        usual = COLUMNS[labels] if labels else PAIR_COLUMNS if pairs else TEXT_COLUMNS
        self.columns = tuple(columns) or usual
        self._digest = hashlib.sha256()
        lines = Format.TEXT if pairs and not columns and suffix_of(Path(name)) == ".tsv" else None
        self._file = CorpusFile(path=Path(name), columns=self.columns, declared=lines)
        if self._file.path == STDIN:
            raise InputError("a corpus to tune on is read more than once: write standard input to a file")
        if labels and not self.has_columns:
            raise InputError(f"corpus {name}: labels need .tsv, .csv, .jsonl or .parquet: {', '.join(self.columns)}")
        if len(self.columns) != len(usual) and not (labels is Labels.TRIPLETS and len(self.columns) > len(usual)):
            raise InputError(
                f"--column names {len(self.columns)} columns ({', '.join(self.columns)}): "
                + (f"name those of {', '.join(usual)}" if labels or pairs else "name one, or two with --pairs")
            )

    @property
    def sha256(self) -> str:
        """Hash of the file, or of a data set's texts; final after all records were read."""
        return self._digest.hexdigest() if self.name.startswith(HUB) else sha256_file(Path(self.name))

    @property
    def has_columns(self) -> bool:
        """Whether the format has columns."""
        return self.name.startswith(HUB) or self._file.format is not Format.TEXT

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        """Read from the start.

        Raises:
            InputError: a record is malformed; the message names the file, and the line or column.
        """
        if self.name.startswith(HUB):
            yield from self._dataset()
            return
        for row in self._file.rows():
            if self.pairs and not self.has_columns:
                yield _pair(row.values[0], row.where)
            else:
                yield self._texts(row.values, row.where)

    def _texts(self, values: Sequence[Any], where: str) -> tuple[str, ...]:
        if self.labels:
            values = [*values[:-1], *(values[-1] if isinstance(values[-1], list) else values[-1:])]
            values = [str(value) if type(value) in (int, float) else value for value in values]
        names = [*self.columns, *self.columns[-1:] * (len(values) - len(self.columns))]
        return tuple(_text(where, name, value) for name, value in zip(names, values, strict=True))

    def _dataset(self) -> Iterator[tuple[str, ...]]:
        datasets = require("datasets", "train")
        name, *rest = self.name.removeprefix(HUB).split(":")
        if not name or len(rest) > 2:
            raise InputError(f"{self.name}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        config, split = ([None, "train"] if not rest else [None, *rest])[-2:]
        self._digest = hashlib.sha256()
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
            for number, row in enumerate(rows, 1):
                where = f"{self.name}, row {number}"
                if absent := [column for column in self.columns if column not in row]:
                    has = ", ".join(map(repr, row))
                    raise InputError(f"{where}: no column {absent[0]!r}, only {has}. Name the right one with --column")
                texts = self._texts([row[column] for column in self.columns], where)
                self._digest.update("\t".join(texts).encode() + b"\n")
                yield texts
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise InputError(
                f"data set {name!r} (config {config}, split {split}) cannot be read: check the name and the network, "
                f"or pass a file ({type(error).__name__}: {reason})"
            ) from error


def file_names(name: str, only: Sequence[str] = ()) -> list[str]:
    """Return the files that a path, pattern or folder names, or a data set's name: of a folder `only` such endings.

    Raises:
        InputError: there is none.
    """
    return [name] if name.startswith(HUB) else list(map(str, find_files([name], only)))


def _pair(line: str, where: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in line.split("\t"))
    if not line.strip():
        return ("", "")
    if len(parts) != 2 or not all(parts):
        raise InputError(
            f"{where}: a pair is two texts with one TAB between them, and this line has {len(parts) - 1} TABs: "
            f"{line.strip()[:60]!r}"
        )
    return parts


def _text(where: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column!r} holds a {type(value).__name__}, expected text")
    if error := validate_text(0, value):
        raise InputError(f"{where}: column {column!r} {error.reason}")
    return value.strip()
