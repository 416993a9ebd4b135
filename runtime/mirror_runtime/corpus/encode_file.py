"""Encode a corpus into vectors: with flat memory, resumable after a kill, complete or absent.

During a run, `OUT.partial/` holds `state.json` (the input and the settings), the vectors and kept columns so far, and
`windows`, which gets a record once a window's results are on disk. The record has checksums of the window's rows and of
what was written. A later run with the same input, bundle and settings checks both, and resumes behind the last window
that holds. Both runs cut the same windows, and a window's vectors depend on nothing else, so the bytes equal those of
an uninterrupted run. At the end, a sink makes the output of these files.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from mirror_runtime.corpus.corpus import BadTexts, Corpus, check_errors
from mirror_runtime.corpus.files import STDIN, Row
from mirror_runtime.corpus.sinks import HEADER, SINKS, WindowFiles, kept_batch
from mirror_runtime.encoder import WINDOW, Encoder
from mirror_runtime.errors import InputError
from mirror_runtime.folders import locked_folder, named_os_errors, replace_file
from mirror_runtime.strict_json import parse_json, short

_log = logging.getLogger(__name__)

_RECORD = np.dtype(
    [(name, "<u8") for name in ("rows", "truncated", "failed", "kept", "position", "texts", "written", "record")]
)
"""A window's record: its counts, the bytes of its kept columns, how far the input was read, and the CRC-32 of its rows,
of what was written, and of the record itself with 0 in that place."""

_DATA = ("vectors", "tokens", "truncated", "kept", "windows", "table")
_FILES = (*_DATA, "lock", ".state.json.partial", "state.json")
"""What a run keeps in its folder."""


@dataclass(frozen=True, kw_only=True)
class EncodeProgress:
    """How far a run is.

    Attributes:
        texts: rows encoded so far, including an earlier run's.
        truncated: how many of them lost tokens.
        failed: how many of them could not be encoded, and are zero vectors or left out.
        position: how far the input has been read, in bytes of `Corpus.size`.
    """

    texts: int = 0
    truncated: int = 0
    failed: int = 0
    position: int = 0


def encode_file(
    encoder: Encoder,
    source: Corpus,
    output: Path,
    *,
    long_texts: str,
    bad_texts: BadTexts = BadTexts.STOP,
    on_progress: Callable[[EncodeProgress], None] = lambda _: None,
) -> EncodeProgress:
    """Encode every row of a corpus.

    Args:
        encoder: the encoder.
        source: the corpus.
        output: its ending chooses the sink, see `SINKS`. It appears when it is complete, and replaces an existing file
            then.
        long_texts: the encoder's policy, recorded so that a resumed run cannot mix two.
        bad_texts: what happens to rows that cannot be encoded.
        on_progress: called at the start and after each window.

    Returns:
        The final counts.

    Raises:
        InputError: a row cannot be read or encoded; another process writes the same output; or an earlier, unfinished
            run has another input or other settings.
        EngineError: the engine failed. The vectors so far stay, and the next run resumes there.
    """
    output = _checked(output, source)
    sink = SINKS[output.suffix]
    sink.check(output, encoder.spec, source.keep, bad_texts)
    folder = output.with_name(output.name + ".partial")
    artifact = encoder.artifact
    run: dict[str, object] = {
        **source.identity(),
        "fingerprint": encoder.manifest.fingerprint,
        "artifact": None if artifact is None else encoder.manifest.files.get(artifact.path),
        "engine": encoder.engine.name.value,
        "precision": encoder.engine.precision.value,
        "streams": encoder.engine.streams,
        "rows": encoder.rows,
        "long_texts": long_texts,
        "skip": bad_texts is BadTexts.SKIP,
        "window": WINDOW,
    }
    with locked_folder(folder), named_os_errors(folder):
        _start_or_resume(folder, run)
        done = _encode(encoder, source, folder, bad_texts, on_progress)
        sink.write(_window_files(encoder, source, folder, bad_texts), folder / "table")
        if sink.write_beside:
            os.replace(folder / "table", output)
        else:
            os.replace(folder / "vectors", output)
        for name in _FILES:  # the state last: without it a later run takes nothing else over
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's file is in it
        folder.rmdir()
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
