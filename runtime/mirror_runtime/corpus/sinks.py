"""Where vectors go: a NumPy array, Parquet, an index or a table of a vector store, or a file that one loads.

Each sink is written once, from the results of a finished run; `mirror encode` resumes before that. Index and tables
hold floats: int8 vectors are their components.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec, VectorType
from mirror_runtime.corpus.results import HEADER, Results, Window, as_text
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.vectors import components, dtype_of, width_of

POINTS = 256
"""Points of one line of a Qdrant load file: 2 MB of 384 components."""


@dataclass(frozen=True, kw_only=True)
class Sink:
    """One kind of output.

    Attributes:
        write: writes results to a path.
        keeps: number of kept columns that it holds; None for any.
        reserved: its own columns, which no kept column may be called.
        ids: whether the first kept column must hold ids, which are integers: True; or may: False; None for no ids.
        binary: whether it holds binary vectors.
        needs: the module and the extra that it needs; None if numpy is enough.
    """

    write: Callable[[Results, Path], None]
    keeps: int | None = None
    reserved: tuple[str, ...] = ()
    ids: bool | None = None
    binary: bool = False
    needs: tuple[str, str] | None = None


def check_sink(output: Path, spec: EncoderSpec, keep: tuple[str, ...], *, skips: bool) -> Sink:
    """Return the sink of an output's ending, and check before the work that it can be written.

    Raises:
        InputError: no sink has this ending, or it cannot hold the vectors or the columns.
        MissingExtra: its library is not installed.
    """
    sink = SINKS.get(output.suffix)
    if sink is None:
        raise InputError(f"output must end in {', '.join(list(SINKS)[:-1])} or {list(SINKS)[-1]}: {output}")
    if sink.keeps is not None and len(keep) > sink.keeps:
        held = f"vectors and {sink.keeps} id" if sink.keeps else "vectors only"
        raise InputError(f"{output.suffix} holds {held}, and --keep names {', '.join(keep)}: write .parquet")
    if skips and not keep:
        raise InputError("--bad-texts skip loses which vector is whose: name the rows' id with --keep, as to .parquet")
    if spec.vector_type is VectorType.BINARY and not sink.binary:
        raise InputError(f"{output.suffix} cannot hold binary vectors: write .npy or .parquet")
    if wrong := [name for name in keep if name in sink.reserved or keep.count(name) > 1]:
        raise InputError(f"--keep {wrong[0]}: the output has a column of this name already")
    if sink.needs is not None:
        require(*sink.needs)
    return sink


@contextmanager
def vector_table(path: Path, spec: EncoderSpec, kept: Any = ()) -> Iterator[Callable[[Window], None]]:
    """Write a Parquet file with the kept columns, embedding, tokens and truncated, a row group for each window.

    `kept` is the schema of the kept columns.
    """
    pa, parquet = require("pyarrow", "cli"), require("pyarrow.parquet", "cli")
    embedding = pa.list_(pa.from_numpy_dtype(dtype_of(spec)), width_of(spec))
    own = [pa.field("embedding", embedding), pa.field("tokens", pa.int64()), pa.field("truncated", pa.bool_())]
    schema = pa.schema([*kept, *own])
    with parquet.ParquetWriter(path, schema) as writer:

        def append(window: Window) -> None:
            columns = [_lists(window.vectors), pa.array(window.tokens), pa.array(window.truncated)]
            writer.write_table(pa.Table.from_arrays([*window.kept, *columns], schema=schema))

        yield append


def _write_npy(results: Results, path: Path) -> None:
    """Write the header into the space reserved for it, and move the file of vectors."""
    spec, vectors = results.spec, results.folder / "vectors"
    text = f"{{'descr': '{dtype_of(spec).str}', 'fortran_order': False, 'shape': ({results.rows}, {width_of(spec)}), }}"
    with vectors.open("r+b") as stream:
        stream.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little"))
        stream.write(text.ljust(HEADER - 11).encode("ascii") + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(vectors, path)


def _write_parquet(results: Results, path: Path) -> None:
    with vector_table(path, results.spec, results.schema() if results.keep else ()) as append:
        for window in results:
            append(window)


def _write_faiss(results: Results, path: Path) -> None:
    """Write a flat index of inner products, which holds all vectors in memory. A kept column is the vectors' ids."""
    faiss = require("faiss", "faiss")
    index = faiss.IndexFlatIP(results.spec.dim)
    if results.keep:
        index = faiss.IndexIDMap2(index)
    for window, vectors in _floats(results):
        if results.keep:
            index.add_with_ids(vectors, window.kept[0].to_numpy(zero_copy_only=False).astype(np.int64))
        else:
            index.add(vectors)
    faiss.write_index(index, str(path))


def _write_lance(results: Results, path: Path) -> None:
    """Write a LanceDB table: the kept columns and `vector`."""
    pa, lancedb = require("pyarrow", "cli"), require("lancedb", "lancedb")
    vector = pa.field("vector", pa.list_(pa.float32(), results.spec.dim))
    schema = pa.schema([*(results.schema() if results.keep else ()), vector])
    batches = (
        pa.RecordBatch.from_arrays([*window.kept, _lists(vectors)], schema=schema)
        for window, vectors in _floats(results)
    )
    made = path.with_name("made.lance")
    for left in (made, path):  # of a run that was killed here
        shutil.rmtree(left, ignore_errors=True)
    lancedb.connect(str(path.parent)).create_table(made.stem, batches, schema=schema)
    made.rename(path)


def _write_qdrant(results: Results, path: Path) -> None:
    """Write requests of Qdrant's `PUT /collections/NAME/points`, one a line.

    The id of a point is the first kept column if it holds integers from 0, else the row's number; all are the payload.
    """
    number = 0
    pa = require("pyarrow", "cli") if results.keep else None
    has_ids = pa is not None and pa.types.is_integer(results.schema().types[0])
    with path.open("w", encoding="utf-8") as stream:
        for window, vectors in _floats(results):
            points = []
            for row, vector in zip(_rows(results, window), vectors.tolist(), strict=True):
                point_id = next(iter(row.values())) if has_ids else number
                if has_ids and (point_id is None or point_id < 0):
                    raise InputError(
                        f"Qdrant's ids are integers from 0, and a row's is {point_id}: keep another column first"
                    )
                points.append({"id": point_id, "vector": vector, "payload": _finite(row)})
                number += 1
            for at in range(0, len(points), POINTS):
                stream.write(json.dumps({"points": points[at : at + POINTS]}, default=as_text) + "\n")


def _write_pgvector(results: Results, path: Path) -> None:
    """Write SQL that psql runs: the table `embeddings` of the kept columns and `embedding`, and its rows."""
    schema = results.schema() if results.keep else ()
    columns = [f"{_quoted(field.name)} {_sql_type(field.type)}" for field in schema]
    with path.open("w", encoding="utf-8") as stream:
        stream.write(
            "\\set ON_ERROR_STOP on\nSET client_encoding = 'UTF8';\nBEGIN;\nCREATE EXTENSION IF NOT EXISTS vector;\n"
            f"CREATE TABLE embeddings ({', '.join([*columns, f'embedding vector({results.spec.dim})'])});\n"
            "COPY embeddings FROM stdin;\n"
        )
        for window, vectors in _floats(results):
            for row, vector in zip(_rows(results, window), vectors.tolist(), strict=True):
                fields = [_copied(value) for value in row.values()]
                stream.write("\t".join([*fields, json.dumps(vector, separators=(",", ":"))]) + "\n")
        stream.write("\\.\nCOMMIT;\n")


_OWN = ("embedding", "tokens", "truncated")
_SYSTEM = ("tableoid", "xmin", "cmin", "xmax", "cmax", "ctid")  # PostgreSQL has them in every table

SINKS: Mapping[str, Sink] = MappingProxyType(
    {
        ".npy": Sink(write=_write_npy, keeps=0, binary=True),
        ".parquet": Sink(write=_write_parquet, binary=True, reserved=_OWN, needs=("pyarrow", "cli")),
        ".faiss": Sink(write=_write_faiss, keeps=1, ids=True, needs=("faiss", "faiss")),
        ".lance": Sink(write=_write_lance, reserved=("vector", "_rowid", "_distance"), needs=("lancedb", "lancedb")),
        ".qdrant": Sink(write=_write_qdrant, ids=False),
        ".sql": Sink(write=_write_pgvector, reserved=("embedding", *_SYSTEM)),
    }
)
"""The sinks by their output's ending."""


def _floats(results: Results) -> Iterator[tuple[Window, NDArray[np.float32]]]:
    for window in results:
        yield window, np.ascontiguousarray(components(window.vectors, results.spec))


def _lists(vectors: NDArray[Any]) -> Any:
    pa = require("pyarrow", "cli")
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])


def _rows(results: Results, window: Window) -> Iterable[dict[str, Any]]:
    """Yield the kept columns of each row."""
    columns = [column.to_pylist() for column in window.kept]
    return (
        dict(zip(results.keep, (column[at] for column in columns), strict=True)) for at in range(len(window.tokens))
    )


def _finite(value: Any) -> Any:
    """Put null in the place of NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _sql_type(type_: Any) -> str:
    types = require("pyarrow.types", "cli")
    if types.is_integer(type_):
        return "bigint"
    return "double precision" if types.is_floating(type_) else "boolean" if types.is_boolean(type_) else "text"


_ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _copied(value: object) -> str:
    """Write a value as the text format of PostgreSQL's COPY, in which these characters are escaped."""
    if value is None:
        return "\\N"
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    text = as_text(value)
    if "\0" in text:
        raise InputError(f"PostgreSQL holds no NUL, which a kept column has: {text[:60]!r}")
    return text.translate(_ESCAPED)
