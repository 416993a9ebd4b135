"""The results of a run so far: vectors, token counts and kept columns in plain files, one window after another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.corpus.files import Row
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.vectors import Vectors, dtype_of, width_of

HEADER = 128
"""Bytes reserved for the .npy header before the vectors; the row count is only known at the end."""

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
        return pa.schema([(name, _common_type(found)) for name, found in types.items()])

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


def kept_bytes(rows: Sequence[Row], keep: Sequence[str]) -> bytes:
    """Return the kept columns of rows as one Arrow stream; b"" without any."""
    if not keep:
        return b""
    pa, ipc = require("pyarrow", "cli"), require("pyarrow.ipc", "cli")
    values = zip(*(row.values[-len(keep) :] for row in rows), strict=True) if rows else [()] * len(keep)
    batch = pa.RecordBatch.from_arrays([_array(list(column)) for column in values], list(keep))
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


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
    as_text = (v if isinstance(v, str) or v is None else json.dumps(v, default=str) for v in values)
    try:
        return pa.array(list(as_text), pa.string())
    except UnicodeEncodeError as error:
        raise InputError(f"a kept column holds a lone surrogate ({error.reason}), which no file can hold") from error


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
