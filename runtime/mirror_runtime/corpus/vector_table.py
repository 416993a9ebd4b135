"""Vectors as a Parquet table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.extras import require
from mirror_runtime.vectors import Vectors, dtype_of, width_of

Append: TypeAlias = Callable[[Vectors, NDArray[np.int64], NDArray[np.bool_]], None]
"""Appends a row group: vectors [n, width], the texts' token counts [n], and whether each was truncated [n]."""


@contextmanager
def vector_table(path: Path, spec: EncoderSpec) -> Iterator[Append]:
    """Write a Parquet file with the columns embedding, tokens and truncated."""
    pa, parquet = require("pyarrow", "cli"), require("pyarrow.parquet", "cli")
    embedding = pa.list_(pa.from_numpy_dtype(dtype_of(spec)), width_of(spec))
    schema = pa.schema([("embedding", embedding), ("tokens", pa.int64()), ("truncated", pa.bool_())])
    with parquet.ParquetWriter(path, schema) as writer:

        def append(vectors: Vectors, tokens: NDArray[np.int64], truncated: NDArray[np.bool_]) -> None:
            rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width_of(spec))
            columns = [rows, pa.array(tokens), pa.array(truncated)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))

        yield append
