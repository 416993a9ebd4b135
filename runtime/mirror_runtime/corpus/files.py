"""Corpus files as streams of texts: text lines, JSON lines, Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mirror_runtime.errors import EngineError, InputError, NotFiniteError, TextError, one_line
from mirror_runtime.extras import require

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a corpus."""

    text: object  # for JSON and Parquet any value that the file holds there
    position: int  # how far the file has been read, in the unit of `CorpusFile.size`


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A section of a corpus that can be read without the rows before it."""

    number: int
    first: int  # number of its first row in the corpus, from 0
    rows: int  # number of rows
    begin: int  # a byte of a text file, a row group of a Parquet file
    end: int  # where it ends, in the same unit


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """A corpus file.

    Attributes:
        path: a `.txt` (one text a line, empty lines count), `.jsonl` (one object or string a line) or `.parquet` file.
        column: the field or column that holds the text; unused for `.txt`.

    Raises:
        InputError: the file is missing or of another kind.
    """

    path: Path
    column: str = "text"

    def __post_init__(self) -> None:
        if self.path.suffix not in SUFFIXES:
            raise InputError(f"input must end in {', '.join(SUFFIXES)}: rename or convert {self.path}")
        if not self.path.is_file():
            raise InputError(f"{self.path} does not exist or is not a file")

    @property
    def _tabular(self) -> bool:
        return self.path.suffix == ".parquet"

    @property
    def size(self) -> int:
        """Bytes of a text file, rows of a Parquet file."""
        return int(self._open_table().metadata.num_rows) if self._tabular else self.path.stat().st_size

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """Stream the rows after the first `skip`, with at most a few thousand in memory."""
        if self._tabular:
            for position, value in enumerate(islice(self._values(), skip, None), skip + 1):
                yield Row(text=_python_value(value), position=position)
            return
        position = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                position += len(line)
                if number > skip:
                    yield Row(text=self._text(line, number), position=position)

    def shards(self, rows: int) -> Iterator[Shard]:
        """Cut the corpus into shards of so many rows; a Parquet file into whole row groups of at least as many."""
        number = first = count = begin = end = 0
        for unit_rows, unit_size in self._sizes():
            count, end = count + unit_rows, end + unit_size
            if count >= rows:
                yield Shard(number=number, first=first, rows=count, begin=begin, end=end)
                number, first, count, begin = number + 1, first + count, 0, end
        if count:
            yield Shard(number=number, first=first, rows=count, begin=begin, end=end)

    def shard_size(self, shard: Shard) -> int:
        """Return a shard's part of `size`."""
        return shard.rows if self._tabular else shard.end - shard.begin

    def texts(self, shard: Shard) -> Iterator[object]:
        """Stream the texts of a shard."""
        if self._tabular:
            groups = list(range(shard.begin, shard.end))
            yield from map(_python_value, self._values(row_groups=groups))
            return
        with self.path.open("rb") as stream:
            stream.seek(shard.begin)
            for number, line in enumerate(islice(stream, shard.rows), shard.first + 1):
                yield self._text(line, number)

    def check_errors(self, errors: Mapping[int, TextError], before: int, *, zero_bad: bool) -> None:
        """Raise for the first of a window's errors, which has `before` rows before it.

        An `InputError` unless bad rows become zero vectors, and always an `EngineError` where the engine is to blame.
        """
        for at, error in sorted(errors.items()):
            if isinstance(error, NotFiniteError):
                raise EngineError(f"{self.path}, row {before + at + 1} {error.reason}")
            if not zero_bad:
                raise InputError(
                    f"{self.path}, row {before + at + 1}: {error.reason}. Fix it, or write zero vectors for such rows "
                    "with --bad-texts zero"
                )

    def _sizes(self) -> Iterator[tuple[int, int]]:
        """Yield the rows and the length of each part that shards cannot divide: a line, or a row group."""
        if self._tabular:
            metadata = self._open_table().metadata
            yield from ((metadata.row_group(group).num_rows, 1) for group in range(metadata.num_row_groups))
            return
        with self.path.open("rb") as stream:
            yield from ((1, len(line)) for line in stream)

    def _text(self, line: bytes, number: int) -> object:
        """Read the text of a line: the line itself, or a field of its JSON."""
        try:
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}, line {number}: not UTF-8 ({error.reason}): convert the file") from None
        return self._field(text, number) if self.path.suffix == ".jsonl" else text

    def _field(self, line: str, number: int) -> object:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(": line")[0]
            raise InputError(f"{self.path}, line {number}: not JSON ({reason}): write one object a line") from None
        if not isinstance(value, dict):
            return value
        if self.column not in value:
            raise InputError(
                f"{self.path}, line {number}: no field {self.column!r}, only {', '.join(map(repr, value)) or 'none'}. "
                "Name the right one with --text-column"
            )
        return value[self.column]

    def _values(self, **section: Any) -> Iterator[Any]:
        """Stream the column of a Parquet file, or of a section of it, as Arrow's scalars."""
        pyarrow = require("pyarrow", "cli")
        try:
            for batch in self._open_table().iter_batches(4096, columns=[self.column], **section):
                yield from batch.column(0)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{self.path} cannot be read: {one_line(error)}") from error

    def _open_table(self) -> Any:
        """Open a Parquet file and check that it has the column."""
        pyarrow, parquet = require("pyarrow", "cli"), require("pyarrow.parquet", "cli")
        try:
            file = parquet.ParquetFile(self.path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{self.path} is not a Parquet file: {one_line(error)}") from error
        if self.column not in file.schema_arrow.names:
            raise InputError(
                f"{self.path} has no column {self.column!r}; it has {', '.join(file.schema_arrow.names)}. "
                "Name the right one with --text-column"
            )
        return file


def _python_value(value: Any) -> object:
    """Convert an Arrow scalar; what Python cannot hold, such as a string that is not UTF-8, is a bad row's value."""
    try:
        result: object = value.as_py()
    except (ValueError, OverflowError, KeyError) as error:
        return error
    return result
