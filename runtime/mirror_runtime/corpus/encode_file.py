"""Encode a corpus file into a vector file: with flat memory, resumable after a kill, complete or absent.

During a run, `OUT.partial/` holds `state.json` (the input and the settings), the vectors so far, and `windows`, which
gets a record once a window's vectors are on disk. The record has checksums of the window's texts and of what was
written. A later run with the same input, bundle and settings checks both, and resumes behind the last window that
holds. Both runs cut the same windows, and a window's vectors depend on nothing else, so the bytes equal those of an
uninterrupted run.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.corpus.files import CorpusFile, Row
from mirror_runtime.encoder import WINDOW, Encoder
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.folders import locked_folder, named_os_errors, replace_file
from mirror_runtime.strict_json import parse_json, short
from mirror_runtime.vectors import Vectors, dtype_of, width_of

_log = logging.getLogger(__name__)

_HEADER = 128  # bytes reserved for the .npy header, whose row count is only known at the end
_ROW_GROUP = 8192

_RECORD = np.dtype(
    [(name, "<u8") for name in ("rows", "truncated", "failed", "position", "texts", "written", "record")]
)
"""A window's record: its counts, how far the input was read, and the CRC-32 of its texts, of what was written, and of
the record itself with 0 in that place."""

_DATA = ("vectors", "tokens", "truncated", "windows", "table")
_FILES = (*_DATA, "lock", ".state.json.partial", "state.json")
"""What a run keeps in its folder."""

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
    if output.is_symlink():
        try:
            output = output.resolve()  # the link stays, and its target is replaced
        except (OSError, RuntimeError) as error:
            raise InputError(f"{output} is a link that leads nowhere: choose another output") from error
    if not output.parent.is_dir():
        raise InputError(f"directory does not exist: {output.parent}")
    if output.is_dir():
        raise InputError(f"{output} is a directory: choose another output")
    if output.exists() and output.samefile(source.path):
        raise InputError(f"{output} is the input itself, which the vectors would replace: choose another output")
    folder = output.with_name(output.name + ".partial")
    stat, artifact = source.path.stat(), encoder.artifact
    run: dict[str, object] = {
        "input": str(source.path.resolve()),
        "input_bytes": stat.st_size,
        "input_mtime_ns": stat.st_mtime_ns,
        "column": source.column,
        "fingerprint": encoder.manifest.fingerprint,
        "artifact": None if artifact is None else encoder.manifest.files.get(artifact.path),
        "engine": encoder.engine.name.value,
        "precision": encoder.engine.precision.value,
        "streams": encoder.engine.streams,
        "rows": encoder.rows,
        "long_texts": long_texts,
        "window": WINDOW,
    }
    with locked_folder(folder), named_os_errors(folder):
        _start_or_resume(folder, run)
        done = _encode(encoder, source, folder, zero_bad, on_progress)
        finish(folder, done.texts, encoder.spec, output)
        for name in _FILES:  # the state last: without it a later run takes nothing else over
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's file is in it
        folder.rmdir()
    return done


def _encode(
    encoder: Encoder,
    source: CorpusFile,
    folder: Path,
    zero_bad: bool,
    on_progress: Callable[[EncodeProgress], None],
) -> EncodeProgress:
    """Append windows to the partial files until the source is exhausted."""
    read: deque[Row] = deque()
    rows = source.rows()

    def texts() -> Iterator[object]:
        for row in rows:
            read.append(row)
            yield row.text

    row_bytes = {"vectors": _row_bytes(encoder.spec), "tokens": 8, "truncated": 1}
    with ExitStack() as stack:
        files = [stack.enter_context(_open(folder / name)) for name in row_bytes]
        files[0].seek(_HEADER)
        log = stack.enter_context(_open(folder / "windows"))
        done = EncodeProgress()
        for record in _whole_windows(log, files, tuple(row_bytes.values()), folder):
            window_texts = [row.text for row in islice(rows, int(record["rows"]))]
            if _checksum(window_texts) != record["texts"]:
                raise InputError(
                    f"{source.path} has changed since the unfinished run in {folder.name}: delete that to start again"
                )
            done = _add(done, record)
        if done.failed and not zero_bad:
            raise InputError(
                f"{folder.name} holds zero vectors of {done.failed} bad rows: go on with --bad-texts zero, or delete it"
            )
        for file in (*files, log):
            file.truncate()  # a killed run may have written more than it recorded
        on_progress(done)
        for window in encoder.encode_stream(texts(), WINDOW):
            source.check_errors(window.errors, done.texts, zero_bad=zero_bad)
            taken = [read.popleft() for _ in range(len(window.tokens))]
            parts = [array.tobytes() for array in (window.vectors, window.tokens, window.truncated)]
            for file, part in zip(files, parts, strict=True):
                _write(file, part)
            counts = len(taken), int(window.truncated.sum()), len(window.errors), taken[-1].position
            checksums = _checksum([row.text for row in taken]), crc32(b"".join(parts))
            record = np.array([(*counts, *checksums, 0)], _RECORD)
            record["record"] = crc32(record.tobytes())
            _write(log, record.tobytes())
            done = _add(done, record[0])
            on_progress(done)
    return done


def _start_or_resume(folder: Path, run: Mapping[str, object]) -> None:
    """Record the input and the settings, or check that an earlier run's are the same."""
    path = folder / "state.json"
    if not path.exists():
        if foreign := sorted({entry.name for entry in folder.iterdir()} - set(_FILES)):
            raise InputError(f"{folder} holds {foreign[0]}, which is not of a run: move it, or choose another output")
        for name in _DATA:  # of another run, whose state is lost
            (folder / name).unlink(missing_ok=True)
        with replace_file(path) as beside:
            beside.write_text(json.dumps(run), encoding="utf-8")
        return
    try:
        earlier = parse_json(path.read_text(encoding="utf-8"))
        changes = [
            f"{name} was {short(earlier[name])} and is {now!r}" for name, now in run.items() if earlier[name] != now
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is unreadable ({error}): delete {folder.name} to start again") from error
    if changes:
        raise InputError(
            f"{folder.name} holds an unfinished run with other settings: {'; '.join(changes)}. "
            "Finish it with those settings, or delete it to start again"
        )


def _whole_windows(log: BinaryIO, files: Sequence[BinaryIO], row_bytes: Sequence[int], folder: Path) -> Iterator[Any]:
    """Yield the records of the windows whose files hold what was recorded, and leave all files behind the last one."""
    while len(data := log.read(_RECORD.itemsize)) == _RECORD.itemsize:
        record = np.frombuffer(data, _RECORD).copy()[0]
        stated, record["record"] = int(record["record"]), 0
        whole = crc32(record.tobytes()) == stated and record["rows"] <= WINDOW
        begins = [file.tell() for file in files]
        rows = int(record["rows"]) if whole else 0
        parts = [file.read(rows * size) for file, size in zip(files, row_bytes, strict=True)]
        if not whole or crc32(b"".join(parts)) != record["written"]:
            _log.warning("%s is damaged: the run goes on before the damage", folder)
            for file, begin in zip(files, begins, strict=True):
                file.seek(begin)
            log.seek(-_RECORD.itemsize, os.SEEK_CUR)
            return
        yield record
    log.seek(-len(data), os.SEEK_CUR)


def _add(done: EncodeProgress, record: Any) -> EncodeProgress:
    return EncodeProgress(
        texts=done.texts + int(record["rows"]),
        truncated=done.truncated + int(record["truncated"]),
        failed=done.failed + int(record["failed"]),
        position=int(record["position"]),
    )


def _checksum(texts: Iterable[object]) -> int:
    """Return the CRC-32 of texts and of what stands in their place."""
    total = 0
    for text in texts:
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else repr(text).encode()
        total = crc32(data + b"\n", total)
    return total


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _open(path: Path) -> BinaryIO:
    return path.open("r+b" if path.exists() else "w+b")


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
