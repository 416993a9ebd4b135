"""Encode a corpus file into a vector file: with flat memory, resumable after a kill, complete or absent.

During a run, `OUT.partial/` holds the vectors so far and `state.json`, which is replaced after each window's vectors
are on disk. A later run with the same input, bundle and settings resumes there. Both runs cut the same windows, and a
window's vectors depend on nothing else, so the bytes equal those of an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.corpus.files import CorpusFile, Row
from mirror_runtime.encoder import WINDOW, Encoder
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.folders import locked_folder, replace_file
from mirror_runtime.vectors import Vectors, dtype_of, width_of

_HEADER = 128  # bytes reserved for the .npy header, whose row count is only known at the end
_ROW_GROUP = 8192

Append: TypeAlias = Callable[[Vectors, NDArray[np.int64], NDArray[np.bool_]], None]
"""Appends a row group: vectors [n, width], the texts' token counts [n], and whether each was truncated [n]."""


@dataclass(frozen=True, kw_only=True)
class EncodeProgress:
    """How far a run is.

    Attributes:
        texts: rows encoded so far, including an earlier run's.
        truncated: how many of them lost tokens.
        failed: how many of them could not be encoded and are zero vectors.
        position: how far the input has been read, in the unit of `CorpusFile.size`.
    """

    texts: int = 0
    truncated: int = 0
    failed: int = 0
    position: int = 0


def encode_file(
    encoder: Encoder,
    source: CorpusFile,
    output: Path,
    *,
    long_texts: str,
    zero_bad: bool = False,
    on_progress: Callable[[EncodeProgress], None] = lambda _: None,
) -> EncodeProgress:
    """Encode every row of a corpus file.

    Args:
        encoder: the encoder.
        source: the corpus.
        output: a `.npy` file ([rows, width] of the encoder's vector type) or a `.parquet` file (columns embedding,
            tokens, truncated). It appears when it is complete, and replaces an existing file then.
        long_texts: the encoder's policy, recorded so that a resumed run cannot mix two.
        zero_bad: write zero vectors for rows that cannot be encoded and count them, instead of stopping.
        on_progress: called at the start and after each window.

    Returns:
        The final counts.

    Raises:
        InputError: a row cannot be read or encoded; another process writes the same output; or an earlier, unfinished
            run has another input or other settings.
        EngineError: the engine failed. The vectors so far stay, and the next run resumes there.
    """
    finish = {".npy": _finish_npy, ".parquet": _finish_parquet}.get(output.suffix)
    if finish is None:
        raise InputError(f"output must end in .npy or .parquet: {output}")
    if not output.parent.is_dir():
        raise InputError(f"directory does not exist: {output.parent}")
    folder = output.with_name(output.name + ".partial")
    stat = source.path.stat()
    run: dict[str, object] = {
        "input": str(source.path.resolve()),
        "input_bytes": stat.st_size,
        "input_mtime_ns": stat.st_mtime_ns,
        "column": source.column,
        "fingerprint": encoder.manifest.fingerprint,
        "engine": encoder.engine.name.value,
        "precision": encoder.engine.precision.value,
        "streams": encoder.engine.streams,
        "rows": encoder.rows,
        "long_texts": long_texts,
        "window": WINDOW,
    }
    with locked_folder(folder):
        done = _resume(folder, run)
        on_progress(done)
        done = _encode(encoder, source, folder, run, done, zero_bad, on_progress)
        finish(folder, done.texts, encoder.spec, output)
        shutil.rmtree(folder)
    return done


def _encode(
    encoder: Encoder,
    source: CorpusFile,
    folder: Path,
    run: Mapping[str, object],
    done: EncodeProgress,
    zero_bad: bool,
    on_progress: Callable[[EncodeProgress], None],
) -> EncodeProgress:
    """Append windows to the partial files until the source is exhausted."""
    positions: list[int] = []

    def texts(rows: Iterator[Row]) -> Iterator[object]:
        for row in rows:
            positions.append(row.position)
            yield row.text

    row_bytes = {"vectors": _row_bytes(encoder.spec), "tokens": 8, "truncated": 1}
    with ExitStack() as stack:
        files = [
            stack.enter_context(_open_at(folder / name, done.texts * size + (_HEADER if name == "vectors" else 0)))
            for name, size in row_bytes.items()
        ]
        for window in encoder.encode_stream(texts(source.rows(done.texts)), WINDOW):
            if window.errors and not zero_bad:
                first = min(window.errors)
                raise source.row_error(done.texts + first + 1, window.errors[first].reason)
            count = len(window.tokens)
            done = EncodeProgress(
                texts=done.texts + count,
                truncated=done.truncated + int(window.truncated.sum()),
                failed=done.failed + len(window.errors),
                position=positions[count - 1],
            )
            del positions[:count]
            for file, array in zip(files, (window.vectors, window.tokens, window.truncated), strict=True):
                file.write(array.tobytes())
                file.flush()
                os.fsync(file.fileno())
            with replace_file(folder / "state.json") as beside:
                beside.write_text(json.dumps({**run, "progress": asdict(done)}), encoding="utf-8")
            on_progress(done)
    return done


def _resume(folder: Path, run: Mapping[str, object]) -> EncodeProgress:
    """Read how far an earlier run came, and check that its input and settings were those of this one."""
    path = folder / "state.json"
    if not path.exists():
        return EncodeProgress()
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        done = EncodeProgress(**earlier["progress"])
        changes = [f"{name} was {earlier[name]!r} and is {now!r}" for name, now in run.items() if earlier[name] != now]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is unreadable ({error}): delete {folder.name} to start again") from error
    if changes:
        raise InputError(
            f"{folder.name} holds an unfinished run with other settings: {'; '.join(changes)}. "
            "Finish it with those settings, or delete it to start again"
        )
    return done


@contextmanager
def _open_at(path: Path, size: int) -> Iterator[BinaryIO]:
    """Open a partial file at the size that its state confirms, and cut off anything that a killed run wrote beyond."""
    with path.open("r+b" if path.exists() else "w+b") as stream:
        stream.truncate(size)
        stream.seek(size)
        yield stream


def _row_bytes(spec: EncoderSpec) -> int:
    return width_of(spec) * dtype_of(spec).itemsize


def _finish_npy(folder: Path, rows: int, spec: EncoderSpec, output: Path) -> None:
    """Write the header into the space reserved for it, and move the file into place."""
    text = f"{{'descr': '{dtype_of(spec).str}', 'fortran_order': False, 'shape': ({rows}, {width_of(spec)}), }}"
    magic = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
    with (folder / "vectors").open("r+b") as stream:
        stream.write(magic + text.ljust(_HEADER - 11).encode("ascii") + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(folder / "vectors", output)


def _finish_parquet(folder: Path, rows: int, spec: EncoderSpec, output: Path) -> None:
    """Convert the partial files to Parquet, one row group at a time, and move the result into place."""
    with (
        (folder / "vectors").open("rb") as vectors,
        (folder / "tokens").open("rb") as tokens,
        (folder / "truncated").open("rb") as truncated,
        vector_table(folder / "table", spec) as append,
    ):
        vectors.seek(_HEADER)
        for at in range(0, rows, _ROW_GROUP):
            count = min(_ROW_GROUP, rows - at)
            append(
                np.frombuffer(vectors.read(count * _row_bytes(spec)), dtype_of(spec)),
                np.frombuffer(tokens.read(count * 8), np.int64),
                np.frombuffer(truncated.read(count), np.bool_),
            )
    os.replace(folder / "table", output)


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
