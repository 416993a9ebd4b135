"""Make candidates by running the project's own commands, and keep what is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.tradeoff.candidates import Candidate
from mirror_runtime.bundle import MANIFEST_FILE
from mirror_runtime.errors import BundleError, MirrorError, one_line
from mirror_runtime.folders import replace_file
from mirror_runtime.strict_json import from_json, read_object, to_json
from mirror_runtime.triton.server import launch

ROOT = Path(__file__).resolve().parents[2]

DONE_FILE = "done.json"
"""In a candidate's folder: how it was made. Written last: without it the folder is a killed run's, and made anew."""

REFUSED_STATUS = 1
"""Of an export that wrote its bundle without a precision that missed its floor."""

BARS = frozenset("━█")
"""Of a command's progress bars, which would be drawn into the one that is shown."""

Run = Callable[[Sequence[str], Path, Callable[[str], None]], int]
"""Runs a command with its output in a log, calls back with each line, and returns the exit status."""


class CandidateError(MirrorError):
    """A candidate that could not be made. The others are unharmed."""


@dataclass(frozen=True)
class Place:
    """What a placeholder stands for."""

    path: str  # or a hub name
    digest: str  # of what is there


@dataclass(frozen=True, kw_only=True)
class Record:
    """How a candidate was made."""

    seconds: float
    commands: tuple[str, ...]  # as they were run
    refused: Mapping[str, str]  # artifacts below their floor, with the reason


@dataclass(frozen=True, kw_only=True)
class Made:
    """A candidate that exists."""

    candidate: Candidate
    folder: Path
    digest: str  # of everything that it was made from
    record: Record

    @property
    def bundle(self) -> Path:
        """The folder of its bundle."""
        return self.folder / "bundle"


def run_script(command: Sequence[str], log: Path, on_line: Callable[[str], None]) -> int:
    """Run a script of this repository, which is ended when this process ends."""
    program = [sys.executable, "-I", launch.__file__, str(os.getpid())] if sys.platform == "linux" else []
    program += [sys.executable, str(ROOT / command[0]), *command[1:]]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    with (
        log.open("a", encoding="utf-8", buffering=1) as file,
        subprocess.Popen(program, **streams, text=True, encoding="utf-8", errors="replace") as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                file.write(line)
                on_line(line.strip())
        except BaseException:
            child.terminate()
            raise
    return child.returncode


def make(
    candidate: Candidate,
    output: Path,
    places: Mapping[str, Place],
    on_line: Callable[[str], None] = lambda _: None,
    run: Run = run_script,
) -> Made:
    """Make a candidate in `output/NAME`, or return the one that is there and was made from the same inputs.

    Args:
        candidate: what to make.
        output: the folder of all candidates, which no other process is writing.
        places: what the placeholders of its commands stand for, except `here`.
        on_line: called with each line that a command prints.
        run: runs one command.

    Raises:
        CandidateError: a command failed, or a place is missing, because a candidate that it needs failed. The output
            is in `output/NAME.log`; nothing else is left.
        InputError: the folder cannot be written.
    """
    folder, log = output / candidate.name, output / f"{candidate.name}.log"
    if missing := candidate.places - places.keys():
        raise CandidateError(f"needs {', '.join(sorted(missing))}, which failed")
    digest = digest_of(candidate.commands, {name: places[name].digest for name in sorted(candidate.places)})
    paths = {name: place.path for name, place in places.items()}
    manifest = folder / "bundle" / MANIFEST_FILE
    record: Record | None = kept(Record, folder / DONE_FILE, digest) if manifest.is_file() else None
    if record is None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        paths["here"] = str(folder)
        began, refused = time.perf_counter(), dict[str, str]()
        commands = [[word.format_map(paths) for word in command] for command in candidate.commands]
        try:
            for command in commands:
                refused |= _run(command, log, on_line, run)
            if not manifest.is_file():
                raise CandidateError(f"its commands wrote no bundle: see {log}")
        except CandidateError:
            shutil.rmtree(folder)
            raise
        seconds = round(time.perf_counter() - began, 1)
        record = Record(seconds=seconds, commands=tuple(map(shlex.join, commands)), refused=refused)
        keep(folder / DONE_FILE, digest, record)
    return Made(candidate=candidate, folder=folder, digest=digest, record=record)


def _run(words: Sequence[str], log: Path, on_line: Callable[[str], None], run: Run) -> dict[str, str]:
    """Run a command, and return the artifacts that an export refused, with the reason."""
    lines: list[str] = []

    def read(line: str) -> None:
        lines.append(line)
        if BARS.isdisjoint(line):
            on_line(line)

    status = run(words, log, read)
    exports = words[0] == "export/to_onnx.py"
    if status == 0 and not exports:
        return {}
    if exports and status in (0, REFUSED_STATUS):
        with contextlib.suppress(IndexError, KeyError, TypeError, ValueError):  # the last line is not its report
            return {one["artifact"]: one["reason"] for one in json.loads(lines[-1])["refused"]}
    # An error is a line of its own; of a traceback the last line names the fault.
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    reason = one_line("; ".join(errors)) or "it printed nothing"
    raise CandidateError(f"{words[0]} ended with status {status}: {reason} (see {log})")


def digest_of(*values: Any) -> str:
    """Hash JSON values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def kept(kind: Any, path: Path, digest: str) -> Any:
    """Return the `kind` that `keep` wrote under the same digest; None if there is none, or a file is damaged."""
    try:
        found = read_object(path, "nothing is kept")
        return from_json(kind, found.get("value"), str(path)) if found.get("digest") == digest else None
    except BundleError:
        return None


def keep(path: Path, digest: str, value: Any) -> None:
    """Write a value of dataclasses, with the digest of everything that it follows from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as beside:
        beside.write_text(json.dumps(to_json({"digest": digest, "value": value})) + "\n", encoding="utf-8")


def peak_child_memory_bytes() -> int:
    """Return the most memory that one of the ended commands has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
