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
from mirror_runtime.corpus.results import HEADER, RECORD, Results, kept_bytes, kept_errors
from mirror_runtime.corpus.sinks import Sink, check_sink
from mirror_runtime.encoded import check_text_vectors
from mirror_runtime.encoder import WINDOW, Encoded, Encoder
from mirror_runtime.errors import InputError, TextError
from mirror_runtime.folders import locked_folder, named_os_errors, replace_file
from mirror_runtime.strict_json import parse_json, short
from mirror_runtime.vectors import dtype_of, width_of

_log = logging.getLogger(__name__)

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
    check_text_vectors(encoder.spec)
    output = _checked(output, source)
    skips = bad_texts is BadTexts.SKIP
    sink = check_sink(output, encoder.spec, source.keep, skips=skips)
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
        "skip": skips,
        "window": WINDOW,
    }
    with locked_folder(folder), named_os_errors(folder):
        _start_or_resume(folder, run)
        done = _encode(encoder, source, folder, sink, bad_texts, on_progress)
        sink.write(Results(folder=folder, spec=encoder.spec, keep=source.keep), folder / "table")
        os.replace(folder / "table", output)
        for name in _FILES:  # the state last: without it a later run takes nothing else over
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's file is in it
        folder.rmdir()
    return done


def _checked(output: Path, source: Corpus) -> Path:
    """Return the path that an output is to be written to; a link stays, and its target is replaced."""
    if output.is_symlink():
        try:
            output = output.resolve()
        except (OSError, RuntimeError) as error:
            raise InputError(f"{output} is a link that leads nowhere: choose another output") from error
    if not output.parent.is_dir():
        raise InputError(f"directory does not exist: {output.parent}")
    if output.is_dir():
        raise InputError(f"{output} is a directory: choose another output")
    if output.exists() and any(file.path != STDIN and output.samefile(file.path) for file in source.files):
        raise InputError(f"{output} is the input itself, which the vectors would replace: choose another output")
    source.check_output(output)
    return output


def encode_rows(encoder: Encoder, rows: Iterable[Row], window: int = WINDOW) -> Iterator[tuple[list[Row], Encoded]]:
    """Encode the first value of rows, and yield each window's rows with its results."""
    read: deque[Row] = deque()

    def texts() -> Iterator[object]:
        for row in rows:
            read.append(row)
            yield row.values[0]

    for encoded in encoder.encode_stream(texts(), window):
        yield [read.popleft() for _ in encoded.tokens], encoded


def _encode(
    encoder: Encoder,
    source: Corpus,
    folder: Path,
    sink: Sink,
    bad_texts: BadTexts,
    on_progress: Callable[[EncodeProgress], None],
) -> EncodeProgress:
    """Append windows to the partial files until the source is exhausted."""
    rows = source.rows()
    row_bytes = {"vectors": width_of(encoder.spec) * dtype_of(encoder.spec).itemsize, "tokens": 8, "truncated": 1}
    with ExitStack() as stack:
        files = [stack.enter_context(_open(folder / name)) for name in (*row_bytes, "kept")]
        files[0].seek(HEADER)
        log = stack.enter_context(_open(folder / "windows"))
        done = EncodeProgress()
        for record in _whole_windows(log, files, tuple(row_bytes.values()), folder):
            if _checksum(islice(rows, int(record["rows"]))) != record["texts"]:
                names = ", ".join(str(file.path) for file in source.files)
                raise InputError(
                    f"{names} has changed since the unfinished run in {folder.name}: delete that to start again"
                )
            done = _add(done, record)
        if done.failed and bad_texts is BadTexts.STOP:
            raise InputError(
                f"{folder.name} holds zero vectors of {done.failed} bad rows: go on with --bad-texts zero, or delete it"
            )
        for file in (*files, log):
            file.truncate()  # a killed run may have written more than it recorded
        on_progress(done)
        for taken, window in encode_rows(encoder, rows, WINDOW):
            errors = _checked_errors(taken, window.errors, source.keep, bad_texts)
            skipped = errors if bad_texts is BadTexts.SKIP else {}
            left = [at for at in range(len(taken)) if at not in skipped]
            kept = kept_bytes([taken[at] for at in left], source.keep, ids=sink.ids)
            parts = [array[left].tobytes() for array in (window.vectors, window.tokens, window.truncated)] + [kept]
            for file, part in zip(files, parts, strict=True):
                _write(file, part)
            counts = len(taken), len(left), int(window.truncated[left].sum()), len(errors), len(kept)
            checksums = _checksum(taken), crc32(b"".join(parts))
            record = np.array([(*counts, taken[-1].position, *checksums, 0)], RECORD)
            record["record"] = crc32(record.tobytes())
            _write(log, record.tobytes())
            done = _add(done, record[0])
            on_progress(done)
    return done


def _checked_errors(
    rows: Sequence[Row], errors: Mapping[int, TextError], keep: Sequence[str], bad_texts: BadTexts
) -> Mapping[int, TextError]:
    """Return a window's errors and those of its kept values, which must be skipped; raise for the first otherwise."""
    check_errors(rows, errors, bad_texts)
    unkept = kept_errors(rows, keep)
    if unkept and bad_texts is not BadTexts.SKIP:
        at, error = next(iter(unkept.items()))
        raise InputError(f"{rows[at].where}: {error.reason}. Fix it, or leave such rows out with --bad-texts skip")
    return {**unkept, **errors}


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
    while len(data := log.read(RECORD.itemsize)) == RECORD.itemsize:
        record = np.frombuffer(data, RECORD).copy()[0]
        stated, record["record"] = int(record["record"]), 0
        whole = crc32(record.tobytes()) == stated and record["rows"] <= WINDOW
        begins = [file.tell() for file in files]
        sizes = [int(record["written"]) * size for size in row_bytes] + [int(record["kept"])] if whole else []
        if not whole or crc32(b"".join(file.read(size) for file, size in zip(files, sizes))) != record["data"]:  # noqa: B905
            _log.warning("%s is damaged: the run goes on before the damage", folder)
            for file, begin in zip(files, begins, strict=True):
                file.seek(begin)
            log.seek(-RECORD.itemsize, os.SEEK_CUR)
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


def _checksum(rows: Iterable[Row]) -> int:
    """Return the CRC-32 of rows: of texts, of what stands in their place, and of what is kept."""
    total = 0
    for row in rows:
        for value in row.values:
            data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else repr(value).encode()
            total = crc32(data + b"\n", total)
    return total


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _open(path: Path) -> BinaryIO:
    return path.open("r+b" if path.exists() else "w+b")
