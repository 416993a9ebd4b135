"""Readers of corpus files: text lines, pairs, CSV, JSON lines, Parquet, and data sets by name.

Every reader holds one line, or one batch of rows, in memory.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

from mirror_runtime.bundle import sha256_file
from mirror_runtime.errors import InputError, one_line
from mirror_runtime.extras import require
from training.labels import COLUMNS, Labels

HUB = "hf:"
"""Prefix of a data set's name: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`."""

TEXT_COLUMNS = ("text",)
PAIR_COLUMNS = ("text1", "text2")


class Records:
    """One corpus file as an iterable of records: tuples of one text, or of two if `pairs` is set.

    Texts are stripped; an empty line or a missing value becomes empty texts.

    Args:
        name: a path, or `hf:` and a data set's name. `.jsonl` or `.ndjson`, `.parquet`, `.csv`, and `.tsv` without
            `pairs`, both with a header line, are read as such, anything else as UTF-8 text; `.gz` is decompressed.
        pairs: two texts a record: separated by one TAB in a text file, in two columns elsewhere.
        columns: of JSON lines, Parquet and data sets; empty means `text`, `text1` and `text2`, or those of the labels.
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
        if self._suffix == ".json":
            raise InputError(f"corpus {name}: write one object a line (.jsonl), such as with jq -c '.[]'")
        if labels and not self.has_columns:
            raise InputError(f"corpus {name}: labels need .tsv, .csv, .jsonl or .parquet: {', '.join(self.columns)}")
        if len(self.columns) != len(usual) and not (labels is Labels.TRIPLETS and len(self.columns) > len(usual)):
            raise InputError(
                f"--column names {len(self.columns)} columns ({', '.join(self.columns)}): "
                + (f"name those of {', '.join(usual)}" if labels or pairs else "name one, or two with --pairs")
            )

    @property
    def sha256(self) -> str:
        """Hash of the file's (decompressed) bytes, or of a data set's texts; final after all records were read."""
        return self._digest.hexdigest()

    @property
    def has_columns(self) -> bool:
        """Whether the format has columns."""
        return self.name.startswith(HUB) or self._suffix in (".jsonl", ".ndjson", ".parquet") or self._separated

    @property
    def _suffix(self) -> str:
        return Path(self.name.removesuffix(".gz")).suffix.lower()

    @property
    def _separated(self) -> bool:
        """Whether the file has a header line and fields: `.tsv` with `pairs` are plain lines of two texts."""
        return self._suffix == ".csv" or (self._suffix == ".tsv" and not self.pairs)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        """Read from the start.

        Raises:
            InputError: a record is malformed; the message names the file, and the line or column.
        """
        self._digest = hashlib.sha256()
        if self.name.startswith(HUB):
            return self._dataset()
        if self._suffix == ".parquet":
            return self._parquet()
        if self._separated:
            return self._table()
        return self._json_lines() if self._suffix in (".jsonl", ".ndjson") else self._text_lines()

    def _text_lines(self) -> Iterator[tuple[str, ...]]:
        for number, line in self._lines():
            text = line.strip()
            if not self.pairs:
                yield (text,)
            elif not text:
                yield ("", "")
            else:
                parts = [part.strip() for part in line.split("\t")]
                if len(parts) != 2 or not all(parts):
                    raise InputError(
                        f"corpus {self.name}, line {number}: a pair is two texts with one TAB between them, and this "
                        f"line has {len(parts) - 1} TABs: {text[:60]!r}"
                    )
                yield tuple(parts)

    def _table(self) -> Iterator[tuple[str, ...]]:
        tabs = self._suffix == ".tsv"
        # In the published files of scored pairs quotes mean nothing.
        quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs and self.labels else csv.QUOTE_MINIMAL
        lines = (f"{line}\n" for _, line in self._lines())
        rows = csv.reader(lines, delimiter="\t" if tabs else ",", quoting=quoting)
        csv.field_size_limit(2**31 - 1)  # a text may be longer than the default of 131,072 characters
        try:
            header = next(rows, [])
            _check_columns(f"corpus {self.name}, line 1", self.columns, header)
            places = [header.index(name) for name in self.columns]
            for row in rows:
                if row and len(row) != len(header):
                    raise InputError(
                        f"corpus {self.name}, line {rows.line_num}: {len(row)} fields under a header of {len(header)}: "
                        "quote a text that holds the separator"
                    )
                yield tuple(row[place].strip() for place in places) if row else ("",) * len(places)
        except csv.Error as error:
            raise InputError(f"corpus {self.name}, line {rows.line_num}: {error}") from error

    def _json_lines(self) -> Iterator[tuple[str, ...]]:
        for number, line in self._lines():
            where = f"corpus {self.name}, line {number}"
            if not line.strip():
                yield ("",) * len(self.columns)
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON ({error}): write one object a line") from None
            if isinstance(value, str) and len(self.columns) == 1:
                yield (value.strip(),)
                continue
            if not isinstance(value, dict):
                raise InputError(f"{where}: a {type(value).__name__}, expected an object")
            _check_columns(where, self.columns, list(value))
            yield self._record(where, [value[name] for name in self.columns])

    def _parquet(self) -> Iterator[tuple[str, ...]]:
        pyarrow, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
        try:
            file = parquet.ParquetFile(self.name)
        except OSError as error:
            raise InputError(f"corpus {self.name} cannot be read: {error.strerror or one_line(error)}") from error
        except pyarrow.ArrowException as error:
            raise InputError(f"corpus {self.name} is not a Parquet file: {one_line(error)}") from error
        _check_columns(f"corpus {self.name}", self.columns, file.schema_arrow.names)
        self._digest.update(bytes.fromhex(sha256_file(Path(self.name))))
        row = 0
        try:
            for batch in file.iter_batches(4096, columns=list(self.columns)):
                for values in zip(*(batch.column(name).to_pylist() for name in self.columns), strict=True):
                    row += 1
                    yield self._record(f"corpus {self.name}, row {row}", values)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"corpus {self.name} breaks off after row {row}: {one_line(error)}") from error

    def _dataset(self) -> Iterator[tuple[str, ...]]:
        datasets = require("datasets", "train")
        name, *rest = self.name.removeprefix(HUB).split(":")
        if not name or len(rest) > 2:
            raise InputError(f"{self.name}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        config, split = ([None, "train"] if not rest else [None, *rest])[-2:]
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
            for number, row in enumerate(rows, 1):
                where = f"corpus {self.name}, row {number}"
                _check_columns(where, self.columns, list(row))
                texts = self._record(where, [row[column] for column in self.columns])
                self._digest.update("\t".join(texts).encode() + b"\n")
                yield texts
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise InputError(
                f"data set {name!r} (config {config}, split {split}) cannot be read: check the name and the network, "
                f"or pass a file ({type(error).__name__}: {reason})"
            ) from error

    def _record(self, where: str, values: Sequence[Any]) -> tuple[str, ...]:
        if self.labels:
            values = [*values[:-1], *(values[-1] if isinstance(values[-1], list) else values[-1:])]
            values = [str(value) if type(value) in (int, float) else value for value in values]
        names = [*self.columns, *self.columns[-1:] * (len(values) - len(self.columns))]
        return tuple(_text(where, name, value) for name, value in zip(names, values, strict=True))

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yield the lines with their numbers. Only a newline ends a line: U+2028 may be part of a text."""
        try:
            opened = gzip.open(self.name, "rb") if self.name.endswith(".gz") else open(self.name, "rb")  # noqa: SIM115
            with cast("IO[bytes]", opened) as stream:
                for number, data in enumerate(stream, 1):
                    self._digest.update(data)
                    yield number, self._decode(data, number)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"corpus {self.name} cannot be read: {reason}") from error

    def _decode(self, data: bytes, number: int) -> str:
        if b"\0" in data:
            raise InputError(
                f"corpus {self.name} is not text: line {number} holds NUL bytes. It must be UTF-8, one sentence a line"
            )
        try:
            return data.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"corpus {self.name} is not UTF-8 in line {number}: convert it, for example with iconv"
            ) from error


def _check_columns(where: str, required: Sequence[str], found: Sequence[str]) -> None:
    for name in required:
        if name not in found:
            has = ", ".join(map(repr, found)) or "none"
            raise InputError(f"{where}: no column {name!r}, only {has}. Name the right one with --column")


def _text(where: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column!r} holds a {type(value).__name__}, expected text")
    return value.strip()
