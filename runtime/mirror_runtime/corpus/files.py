"""One corpus file as a stream of rows: text lines, JSON, CSV, Parquet; compressed or not, or standard input.

Every reader holds one row, or one batch of a few thousand, in memory.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, cast

from mirror_runtime.errors import InputError, one_line
from mirror_runtime.extras import require

STDIN = Path("-")
"""The path of standard input."""


class Format(str, Enum):
    """How a file holds rows."""

    TEXT = "text"
    """A text a line. Only a newline ends a line: U+2028 may be part of a text. Empty lines count."""
    JSONL = "jsonl"
    """A JSON object or string a line. Empty lines do not count."""
    JSON = "json"
    """An array of JSON objects or strings, or such values one after another."""
    CSV = "csv"
    """Fields under a header line."""
    TSV = "tsv"
    """Fields with TABs between them, under a header line. Quotes are part of a text."""
    PARQUET = "parquet"


SUFFIXES: Mapping[str, Format] = MappingProxyType(
    {".txt": Format.TEXT, ".ndjson": Format.JSONL} | {f".{one.value}": one for one in list(Format)[1:]}
)
"""The formats of names that tell it, in any case and with or without .gz or .zst. Any other file is text."""

_COMPRESSED = (".gz", ".zst")
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))
_BATCH = 4096
_CHUNK = 65_536
_TORN = 16
"""Characters before a chunk's end in which a JSON error may be a literal or an escape that goes on in the next one."""
_BETWEEN = re.compile(r"[\s,]*")


class Row(NamedTuple):
    """One row of a corpus."""

    values: tuple[Any, ...]
    """Of the columns and of those to keep. From JSON and Parquet any value that stands there, from Parquet to be kept
    an Arrow scalar; an exception for what Python cannot hold, such as a string that is not UTF-8."""
    file: CorpusFile
    number: int  # of its (last) line or of the row, from 1
    position: int  # how far the file has been read, in bytes of `CorpusFile.size`

    @property
    def where(self) -> str:
        """The file, and the line or row in it, for messages."""
        return self.file.where(self.number)


class Part(NamedTuple):
    """A section of a file that can be read without what is before it."""

    first: int  # number of lines or rows before it
    begin: int  # a byte of a text file, a row group of a Parquet file
    end: int  # where it ends, in the same unit


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One corpus file.

    Attributes:
        path: the file; `STDIN` for standard input. Compression is recognised by the content.
        columns: columns or fields to read, which every row must have; unused for text. A dot leads into a struct or an
            object: `meta.text`.
        keep: further ones, which JSON objects may lack.
        declared: the format; None goes by the name, see `SUFFIXES`.
    """

    path: Path
    columns: tuple[str, ...] = ("text",)
    keep: tuple[str, ...] = ()
    declared: Format | None = None

    @property
    def format(self) -> Format:
        """The format."""
        return self.declared or SUFFIXES.get(suffix_of(self.path), Format.TEXT)

    @property
    def size(self) -> int:
        """Bytes, 0 for standard input."""
        return 0 if self.path == STDIN else self.path.stat().st_size

    def where(self, number: int) -> str:
        """Name a line or row of this file for a message."""
        unit = "row" if self.format in (Format.JSON, Format.PARQUET) else "line"
        return f"{self.path}, {unit} {number}"

    def rows(self, part: Part | None = None) -> Iterator[Row]:
        """Stream the rows, or those of a part.

        Raises:
            InputError: the file cannot be read, is malformed, or lacks a column; the message names the place.
        """
        if self.format is Format.TEXT and self.keep:
            raise InputError(f"{self.path} is plain text, which has no column {self.keep[0]!r} to keep")
        if self.format is Format.PARQUET:
            yield from self._parquet(part)
            return
        readers = {Format.TEXT: self._text, Format.JSONL: self._json_lines, Format.JSON: self._json}
        read = readers.get(self.format, self._table)
        try:
            with self._open() as (stream, tell):
                if part is not None:
                    stream.seek(part.begin)
                for number, values in read(stream, part.first if part else 0):
                    position = tell()
                    if part is not None and position > part.end:
                        return
                    yield Row(values, self, number, position)
        except (OSError, EOFError) as error:
            raise InputError(f"{self.path} cannot be read: {getattr(error, 'strerror', None) or error}") from error

    def units(self) -> Iterator[tuple[int, int, int]]:
        """Yield each piece that parts cannot divide: its rows, its lines or rows, and its bytes or row groups.

        Raises:
            InputError: the format has no such pieces.
        """
        if self.format is Format.PARQUET:
            metadata = self._open_table().metadata
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            yield from ((group.num_rows, group.num_rows, 1) for group in groups)
            return
        plain = self.path != STDIN and suffix_of(self.path) == self.path.suffix.lower()
        if not plain or self.format not in (Format.TEXT, Format.JSONL):
            raise InputError(f"{self.path} cannot be read in parts: convert it to .txt, .jsonl or .parquet")
        with self.path.open("rb") as stream:
            for line in stream:
                yield int(self.format is Format.TEXT or bool(line.strip())), 1, len(line)

    @contextmanager
    def _open(self) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
        """Open the file, decompress it, and tell how far it was read."""
        with ExitStack() as stack:
            raw = cast("io.BufferedReader", sys.stdin.buffer)
            if self.path != STDIN:
                raw = stack.enter_context(self.path.open("rb"))
            tell = raw.tell if raw.seekable() else lambda: 0
            head = raw.peek(4)
            codec = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
            if codec is None:
                yield raw, tell
            else:
                native = stack.enter_context(require("pyarrow", "cli").CompressedInputStream(raw, codec))
                yield io.BufferedReader(native), tell

    def _lines(self, stream: BinaryIO, number: int) -> Iterator[tuple[int, str]]:
        for number, data in enumerate(stream, number + 1):  # noqa: B020
            if b"\0" in data:
                raise InputError(f"{self.path} is not text: line {number} holds NUL bytes. It must be UTF-8")
            try:
                yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 ({error.reason}): convert the file, for example with iconv"
                raise InputError(f"{self.where(number)}: {reason}") from None

    def _text(self, stream: BinaryIO, before: int) -> Iterator[tuple[int, tuple[object, ...]]]:
        for number, line in self._lines(stream, before):
            yield number, (line.removesuffix("\n").removesuffix("\r"),)

    def _json_lines(self, stream: BinaryIO, before: int) -> Iterator[tuple[int, tuple[object, ...]]]:
        for number, line in self._lines(stream, before):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = str(error).partition(": line")[0]
                    raise InputError(f"{self.where(number)}: not JSON ({reason}): write one object a line") from None
                yield number, self._fields(value, number)

    def _json(self, stream: BinaryIO, before: int) -> Iterator[tuple[int, tuple[object, ...]]]:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        number = before
        try:
            for number, value in enumerate(_json_values(iter(lambda: text.read(_CHUNK), "")), before + 1):
                yield number, self._fields(value, number)
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is not UTF-8 after row {number} ({error.reason}): convert it") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.where(number + 1)}: not JSON ({str(error).partition(': line')[0]})") from None
        finally:
            text.detach()

    def _table(self, stream: BinaryIO, before: int) -> Iterator[tuple[int, tuple[object, ...]]]:
        csv.field_size_limit(2**31 - 1)  # a text may be longer than the default of 131,072 characters
        is_tsv = self.format is Format.TSV
        lines = (line for _, line in self._lines(stream, before))
        form: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"strict": True}
        rows = csv.reader(lines, **form)
        names, last = (*self.columns, *self.keep), 0
        try:
            header = next(rows, [])
            self._check_columns(names, header, self.where(1))
            places = [header.index(name) for name in names]
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise InputError(
                        f"{self.where(rows.line_num)}: {len(row)} fields under a header of {len(header)}: "
                        "quote a text that holds the separator"
                    )
                yield (last := rows.line_num), tuple(row[place] for place in places)
        except csv.Error as error:
            cure = "" if is_tsv else ": enclose a text that holds a quote in quotes, and double the quote"
            raise InputError(f"{self.path}: the row after line {last} cannot be read ({error}){cure}") from error

    def _fields(self, value: object, number: int) -> tuple[object, ...]:
        """Take the columns out of a JSON value; one that is not an object is the text itself."""
        if not isinstance(value, dict):
            if len(self.columns) > 1:
                raise InputError(f"{self.where(number)}: a {type(value).__name__}, expected an object")
            return (value, *[None] * len(self.keep))
        found = [_field(value, name) for name in self.columns]
        if _ABSENT in found:
            self._check_columns([self.columns[found.index(_ABSENT)]], list(value), self.where(number))
        return (*found, *(None if (one := _field(value, name)) is _ABSENT else one for name in self.keep))

    def _parquet(self, part: Part | None) -> Iterator[Row]:
        pyarrow = require("pyarrow", "cli")
        file, number = self._open_table(), part.first if part else 0
        names = (*self.columns, *self.keep)
        section = {} if part is None else {"row_groups": list(range(part.begin, part.end))}
        share = self.size / max(1, file.metadata.num_rows)
        try:
            for batch in file.iter_batches(_BATCH, columns=list(names), **section):
                for scalars in zip(*(_array(batch, name) for name in names), strict=True):
                    number += 1
                    texts = map(_python_value, scalars[: len(self.columns)])
                    kept = map(_kept_value, scalars[len(self.columns) :])
                    yield Row((*texts, *kept), self, number, int(number * share))
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{self.path} cannot be read after row {number}: {one_line(error)}") from error

    def _open_table(self) -> Any:
        """Open a Parquet file and check that it has the columns."""
        pyarrow, parquet = require("pyarrow", "cli"), require("pyarrow.parquet", "cli")
        if self.path == STDIN:
            raise InputError("Parquet cannot be read from standard input: name the file")
        try:
            file = parquet.ParquetFile(self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or one_line(error)}") from error
        except pyarrow.ArrowException as error:
            raise InputError(f"{self.path} is not a Parquet file: {one_line(error)}") from error
        empty = pyarrow.RecordBatch.from_pylist([], file.schema_arrow)
        for name in (*self.columns, *self.keep):
            try:
                _array(empty, name)
            except (KeyError, pyarrow.ArrowException):
                self._check_columns([name], file.schema_arrow.names, str(self.path))
        return file

    def _check_columns(self, required: Sequence[str], found: Sequence[str], where: str) -> None:
        for name in required:
            if name not in found:
                has = ", ".join(map(repr, found)) or "none"
                option = "--keep" if name in self.keep else "--column"
                raise InputError(f"{where}: no column {name!r}, only {has}. Name the right one with {option}")


def suffix_of(path: Path) -> str:
    """Return the ending that tells the format, in lower case: ".csv" for "IN.CSV.gz"."""
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


_ABSENT = object()


def _field(record: Mapping[str, object], name: str) -> object:
    """Return a field, or the one that dots lead to: null under null, `_ABSENT` if it is not there."""
    if name in record or "." not in name:
        return record.get(name, _ABSENT)
    head, _, rest = name.partition(".")
    inner = record.get(head, _ABSENT)
    return _field(inner, rest) if isinstance(inner, dict) else None if inner is None else _ABSENT


def _array(batch: Any, name: str) -> Any:
    """Return a column of a record batch, or the field of a struct that dots lead to."""
    if name in batch.schema.names:
        return batch.column(name)
    head, *path = name.split(".")
    return require("pyarrow.compute", "cli").struct_field(batch.column(head), path)


def _python_value(value: Any) -> object:
    """Convert an Arrow scalar; what Python cannot hold, such as a string that is not UTF-8, is a bad row's value."""
    try:
        result: object = value.as_py()
    except (ValueError, OverflowError, KeyError) as error:
        return error
    return result


def _kept_value(value: Any) -> object:
    """Return an Arrow scalar itself, or the exception of one whose string is not UTF-8."""
    found = _python_value(value)
    return found if isinstance(found, UnicodeError) else value


def _json_values(chunks: Iterator[str]) -> Iterator[object]:
    """Parse a JSON array, or values one after another, with one value and one chunk in memory."""
    buffer = next((chunk for chunk in chunks if not chunk.isspace()), "").lstrip()
    in_array = buffer.startswith("[")
    at = int(in_array)
    while True:
        at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]  # it matches nothing too
        if in_array and buffer.startswith("]", at):
            if buffer[at + 1 :].strip() or any(not chunk.isspace() for chunk in chunks):
                raise ValueError("text after the array")
            return
        value, end = _json_value(buffer, at)
        if end == at or end > len(buffer) - 3:  # it may go on in the next chunk: "1", "1.", "1e+"
            if more := "".join(islice(chunks, 1 + (len(buffer) - at) // _CHUNK)):
                buffer, at = buffer[at:] + more, 0
                continue
            if at == len(buffer) and not in_array:
                return
            if end == at:
                raise ValueError("the last value is not whole" if at < len(buffer) else "the array does not end")
        yield value
        at = end


def _json_value(buffer: str, at: int) -> tuple[object, int]:
    """Parse the value at a place, and return where it ends: at the same place if it may end behind the buffer."""
    try:
        return json.JSONDecoder().raw_decode(buffer, at) if at < len(buffer) else (None, at)
    except json.JSONDecodeError as error:
        if error.pos < len(buffer) - _TORN and not error.msg.startswith("Unterminated"):
            raise
        return None, at
