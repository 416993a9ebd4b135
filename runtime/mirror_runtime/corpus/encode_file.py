"""A corpus file to a vector file: streamed with flat memory, resumed after a kill, complete or absent.

While it runs, `OUT.partial/` holds the vectors so far and `state.json`, which is replaced after each window's vectors
have reached the disk. A later run with the same input, bundle and settings goes on from there. Windows are the same
in both runs, and a window's vectors depend on the window alone, so the bytes are those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.corpus.files import CorpusFile, Row
from mirror_runtime.encoder import WINDOW, Encoder
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.folders import locked_folder, replace_file
from mirror_runtime.vectors import dtype_of, width_of

OUTPUTS = (".npy", ".parquet")
_HEADER = 128  # bytes kept free for the .npy header, whose row count is known at the end only
_ROW_GROUP = 8192


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is.

    Attributes:
        texts: rows encoded so far, those of an earlier run included.
        truncated: of them, how many lost tokens.
        failed: of them, how many could not be encoded and are rows of zeros.
        position: how far the input has been read, in the unit of `CorpusFile.size`.
    """

    texts: int = 0
    truncated: int = 0
    failed: int = 0
    position: int = 0


@dataclass(frozen=True, kw_only=True)
class _State:
    """`state.json`: what the partial output was made from, and how much of it is there."""

    input: str
    input_bytes: int
    input_mtime_ns: int
    column: str
    fingerprint: str
    engine: str
    precision: str
    streams: int
    rows: str
    long_texts: str
    window: int
    progress: Progress


def encode_file(
    encoder: Encoder,
    source: CorpusFile,
    output: Path,
    *,
    long_texts: str,
    zero_bad: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Encode every row of a corpus file.

    Args:
        encoder: what encodes.
        source: the corpus.
        output: a `.npy` file ([rows, width] of the encoder's vector type) or a `.parquet` file (columns embedding,
            tokens, truncated).
            It appears when it is complete; an existing file is replaced then.
        long_texts: the encoder's policy, recorded so that a resumed job cannot mix two.
        zero_bad: give rows that cannot be encoded a vector of zeros and count them, instead of stopping.
        report: called after each window.

    Returns:
        The final counts.

    Raises:
        InputError: a row cannot be read or encoded; another process writes the same output; or an earlier, unfinished
            run was made from something else.
        EngineError: the engine failed. What was encoded so far stays and is resumed.
    """
    if output.suffix not in OUTPUTS:
        raise InputError(f"{output} is none of {', '.join(OUTPUTS)}: choose one of these endings")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is no folder: create it first")
    folder = output.with_name(output.name + ".partial")
    stat = source.path.stat()
    fresh = _State(
        input=str(source.path.resolve()),
        input_bytes=stat.st_size,
        input_mtime_ns=stat.st_mtime_ns,
        column=source.column,
        fingerprint=encoder.manifest.fingerprint,
        engine=encoder.engine.name.value,
        precision=encoder.engine.precision.value,
        streams=encoder.engine.streams,
        rows=encoder.rows,
        long_texts=long_texts,
        window=WINDOW,
        progress=Progress(),
    )
    with locked_folder(folder):
        state = _resume(folder, fresh)
        report(state.progress)
        state = _encode(encoder, source, folder, state, zero_bad, report)
        if output.suffix == ".npy":
            _finish_npy(folder, state.progress.texts, encoder.spec, output)
        else:
            _finish_parquet(folder, state.progress.texts, encoder.spec, output)
        shutil.rmtree(folder)
    return state.progress


def _encode(
    encoder: Encoder,
    source: CorpusFile,
    folder: Path,
    state: _State,
    zero_bad: bool,
    report: Callable[[Progress], None],
) -> _State:
    """Append windows to the partial files until the source is exhausted."""
    done = state.progress
    positions: list[int] = []

    def texts(rows: Iterator[Row]) -> Iterator[object]:
        for row in rows:
            positions.append(row.position)
            yield row.text

    with (
        _appending(folder / "vectors", _HEADER + done.texts * _row_bytes(encoder.spec)) as vectors,
        _appending(folder / "tokens", done.texts * 8) as tokens,
        _appending(folder / "truncated", done.texts) as truncated,
    ):
        for part in encoder.encode_stream(texts(source.rows(done.texts)), state.window):
            if part.errors and not zero_bad:
                first = min(part.errors)
                raise InputError(
                    f"{source.path}, row {done.texts + first + 1}: {part.errors[first].reason}. "
                    "Mend it, or give such rows zero vectors with --bad-texts zero"
                )
            count = len(part.tokens)
            vectors.write(part.vectors.tobytes())
            tokens.write(part.tokens.tobytes())
            truncated.write(part.truncated.tobytes())
            done = Progress(
                texts=done.texts + count,
                truncated=done.truncated + int(part.truncated.sum()),
                failed=done.failed + len(part.errors),
                position=positions[count - 1],
            )
            del positions[:count]
            for stream in (vectors, tokens, truncated):
                stream.flush()
                os.fsync(stream.fileno())
            state = replace(state, progress=done)
            _write_state(folder, state)
            report(done)
    return state


def _resume(folder: Path, fresh: _State) -> _State:
    """Read the state of an earlier run, or start with the fresh one."""
    path = folder / "state.json"
    if not path.exists():
        return fresh
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        state = _State(**{**data, "progress": Progress(**data["progress"])})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is unreadable ({error}): delete {folder.name} to start again") from error
    differ = [
        f"{f.name} was {getattr(state, f.name)!r} and is {getattr(fresh, f.name)!r}"
        for f in fields(_State)
        if f.name != "progress" and getattr(state, f.name) != getattr(fresh, f.name)
    ]
    if differ:
        raise InputError(
            f"{folder.name} holds an unfinished run of something else: {'; '.join(differ)}. "
            "Finish it with those settings, or delete it to start again"
        )
    return state


def _write_state(folder: Path, state: _State) -> None:
    with replace_file(folder / "state.json") as beside:
        beside.write_text(json.dumps(asdict(state)), encoding="utf-8")


@contextmanager
def _appending(path: Path, size: int) -> Iterator[BinaryIO]:
    """Open a partial file at the size that its state vouches for; what a killed run wrote beyond it is dropped."""
    with path.open("r+b" if path.exists() else "w+b") as stream:
        stream.truncate(size)
        stream.seek(size)
        yield stream


def _row_bytes(spec: EncoderSpec) -> int:
    return width_of(spec) * dtype_of(spec).itemsize


def _finish_npy(folder: Path, rows: int, spec: EncoderSpec, output: Path) -> None:
    """Write the header into the space kept for it and move the file into place."""
    text = f"{{'descr': '{dtype_of(spec).str}', 'fortran_order': False, 'shape': ({rows}, {width_of(spec)}), }}"
    magic = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
    with (folder / "vectors").open("r+b") as stream:
        stream.write(magic + text.ljust(_HEADER - 11).encode("ascii") + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(folder / "vectors", output)


def _finish_parquet(folder: Path, rows: int, spec: EncoderSpec, output: Path) -> None:
    """Convert the partial files to Parquet, a row group at a time, and move the result into place."""
    pa, parquet = require("pyarrow", "cli"), require("pyarrow.parquet", "cli")
    dtype, width = dtype_of(spec), width_of(spec)
    embedding = pa.list_(pa.from_numpy_dtype(dtype), width)
    schema = pa.schema([("embedding", embedding), ("tokens", pa.int64()), ("truncated", pa.bool_())])
    with (
        (folder / "vectors").open("rb") as vectors,
        (folder / "tokens").open("rb") as tokens,
        (folder / "truncated").open("rb") as truncated,
        parquet.ParquetWriter(folder / "table", schema) as writer,
    ):
        vectors.seek(_HEADER)
        for at in range(0, rows, _ROW_GROUP):
            count = min(_ROW_GROUP, rows - at)
            values = pa.array(np.frombuffer(vectors.read(count * _row_bytes(spec)), dtype))
            columns = [
                pa.FixedSizeListArray.from_arrays(values, width),
                pa.array(np.frombuffer(tokens.read(count * 8), np.int64)),
                pa.array(np.frombuffer(truncated.read(count), np.bool_)),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    os.replace(folder / "table", output)
