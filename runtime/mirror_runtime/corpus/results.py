"""The results of a run so far: vectors, token counts and kept columns in plain files, one window after another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.corpus.files import Row
from mirror_runtime.errors import InputError, TextError
from mirror_runtime.extras import require
from mirror_runtime.vectors import Vectors, dtype_of, width_of

HEADER = 128
"""Bytes reserved for the .npy header before the vectors; the row count is only known at the end."""

_SURROGATE = re.compile("[\ud800-\udfff]")  # lone ones: Python joins those of a pair

_ID = re.compile("0|-?[1-9][0-9]{0,18}")

_COUNTS = ("rows", "written", "truncated", "failed", "kept", "position", "texts", "data", "record")
RECORD = np.dtype([(name, "<u8") for name in _COUNTS])
"""A window's record: rows read and written, other counts, the bytes of its kept columns, how far the input was read,
and the CRC-32 of its rows, of what was written, and of the record itself with 0 in that place."""


class Window(NamedTuple):
    """The results of one window of rows."""

    vectors: Vectors  # [n, width]
    tokens: NDArray[np.int64]  # [n]
    truncated: NDArray[np.bool_]  # [n]
    kept: Sequence[Any]  # Arrow arrays [n], one for each kept column


@dataclass(frozen=True, kw_only=True)
class Results:
    """The complete results of a run, as an iterable of windows."""

    folder: Path  # with the files vectors, tokens, truncated, kept, windows
    spec: EncoderSpec
    keep: tuple[str, ...]  # names of the kept columns

    @property
    def rows(self) -> int:
        """The number of vectors."""
        return int(self._records()["written"].sum())

    def schema(self) -> Any:
        """Return the Arrow schema of the kept columns over all windows; what has no common type is a string."""
        pa = require("pyarrow", "cli")
        types: dict[str, set[Any]] = {name: set() for name in self.keep}
        for batch in self._kept():
            for field in batch.schema:
                types[field.name].add(field.type)
        schema = pa.schema([(name, _common_type(found)) for name, found in types.items()])
        for batch in self._kept() if any(len(found) > 1 for found in types.values()) else ():
            for at, column in enumerate(batch.columns):
                if not _can_cast(column, schema.field(at).type):  # an integer beyond 2^53 among floats
                    schema = schema.set(at, pa.field(schema.names[at], pa.string()))
        return schema

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows in order."""
        width, dtype = width_of(self.spec), dtype_of(self.spec)
        schema = self.schema() if self.keep else None
        kept = self._kept()
        with (
            (self.folder / "vectors").open("rb") as vectors,
            (self.folder / "tokens").open("rb") as tokens,
            (self.folder / "truncated").open("rb") as truncated,
        ):
            vectors.seek(HEADER)
            for count in map(int, self._records()["written"]):
                yield Window(
                    np.frombuffer(vectors.read(count * width * dtype.itemsize), dtype).reshape(count, width),
                    np.frombuffer(tokens.read(count * 8), np.int64),
                    np.frombuffer(truncated.read(count), np.bool_),
                    [_cast(column, type_) for column, type_ in zip(next(kept), schema.types, strict=True)]
                    if schema is not None
                    else [],
                )

    def _records(self) -> NDArray[Any]:
        return np.fromfile(self.folder / "windows", RECORD)

    def _kept(self) -> Iterator[Any]:
        """Yield the record batch of each window's kept columns."""
        ipc = require("pyarrow.ipc", "cli")
        with (self.folder / "kept").open("rb") as stream:
            for size in map(int, self._records()["kept"]):
                yield ipc.open_stream(stream.read(size)).read_next_batch()


def kept_errors(rows: Sequence[Row], keep: Sequence[str]) -> Mapping[int, TextError]:
    """Return an error for each row that has a kept value which no file can hold."""
    errors = {}
    for at, row in enumerate(rows if keep else ()):
        for name, value in zip(keep, row.values[-len(keep) :], strict=True):
            if not _is_utf8(value):
                errors[at] = TextError(at, f"column {name!r} is not UTF-8, or has a lone surrogate")
    return errors


def _is_utf8(value: object) -> bool:
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return not isinstance(value, UnicodeError) and not (isinstance(value, str) and _SURROGATE.search(value))


def kept_bytes(rows: Sequence[Row], keep: Sequence[str], *, ids: bool | None = None) -> bytes:
    """Return the kept columns of rows as one Arrow stream; b"" without any.

    Args:
        rows: the rows.
        keep: names of the kept columns.
        ids: whether the first column must hold integers, or digits as CSV does: True; or may, as ids: False.

    Raises:
        InputError: a row's id is null, or is not an integer where it must be.
    """
    if not keep:
        return b""
    pa, ipc = require("pyarrow", "cli"), require("pyarrow.ipc", "cli")
    values = zip(*(row.values[-len(keep) :] for row in rows), strict=True) if rows else [()] * len(keep)
    first, *others = (_array(list(column)) for column in values)
    first = first if ids is None else _ids(first, rows, required=ids)
    batch = pa.RecordBatch.from_arrays([first, *others], list(keep))
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _ids(column: Any, rows: Sequence[Row], *, required: bool) -> Any:
    """Return integers, or strings of their digits, as integers; other columns as they are, unless ids are required."""
    pa = require("pyarrow", "cli")
    is_integer = pa.types.is_integer(column.type)
    if not (required or is_integer or pa.types.is_string(column.type)):
        return column
    values = column.to_pylist()
    bad = next((at for at, one in enumerate(values) if not _ID.fullmatch(str(one)) or abs(int(one)) >= 2**63), None)
    if bad is None:
        return pa.array(map(int, values), pa.int64())
    if required or (is_integer and values[bad] is None):
        reason = f"{values[bad]!r} is not an integer of 64 bits: fix it, or keep another column first"
        raise InputError(f"{rows[bad].where}: the id {reason}")
    return column


def _array(values: list[Any]) -> Any:
    """Build an Arrow array of Python values, or of scalars of one type; strings if they have no common type."""
    pa = require("pyarrow", "cli")
    if values and all(isinstance(value, pa.Scalar) and value.type == values[0].type for value in values):
        return pa.array(values, values[0].type)
    plain = [value.as_py() if isinstance(value, pa.Scalar) else value for value in values]
    try:
        return pa.array(plain)
    except (pa.ArrowException, OverflowError):
        return _strings(plain)


def _strings(values: Iterable[Any]) -> Any:
    pa = require("pyarrow", "cli")
    return pa.array([None if value is None else as_text(value) for value in values], pa.string())


def as_text(value: object) -> str:
    """Write a value as a string: lists, objects, numbers as JSON, bytes in hexadecimal, others as Python's `str`."""
    if isinstance(value, (dict, list, bool, int, float)):
        return json.dumps(value, default=str)
    return value.hex() if isinstance(value, bytes) else str(value)


def _can_cast(column: Any, type_: Any) -> bool:
    try:
        _cast(column, type_)
    except require("pyarrow", "cli").ArrowException:
        return False
    return True


def _common_type(types: set[Any]) -> Any:
    pa = require("pyarrow", "cli")
    ordered = sorted(types - {pa.null()}, key=str) or [pa.null()]
    try:
        schemas = [pa.schema([("x", one)]) for one in ordered]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _cast(column: Any, type_: Any) -> Any:
    if column.type == type_:
        return column
    return _strings(column.to_pylist()) if type_ == require("pyarrow", "cli").string() else column.cast(type_)
