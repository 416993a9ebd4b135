"""Virtual environments of other libraries: made on demand from pinned requirements, and stamped with their hash."""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from benchmarks.workers import run_to_end
from mirror_runtime.errors import InputError, PeerError

STAMP = ".requirements-sha256"
INCOMPLETE = "incomplete"


def existing_environment(folder: Path) -> Path:
    """Return the interpreter of an environment that the user made; its packages are not checked.

    Raises:
        PeerError: the folder is not a virtual environment.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        raise PeerError(f"{folder} is not a virtual environment: {python} does not exist")
    return python


def make_environment(requirements: Path, folder: Path, on_progress: Callable[[str], None]) -> Path:
    """Make an environment unless its stamp shows that it is complete, and return its interpreter.

    The hash is written to the stamp last, so an interrupted installation is repeated. A folder with an outdated stamp
    is replaced; one without a stamp is the user's own and is used as it is. Where packages come from is pip's own
    configuration (its configuration files and PIP_ variables).

    Raises:
        PeerError: it cannot be made; the message has the last line of pip's output.
    """
    digest = hashlib.sha256(requirements.read_bytes() + platform.python_version().encode()).hexdigest()
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
        return existing_environment(folder)
    if folder.exists() and not stamp.is_file():
        return existing_environment(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stamp.write_text(INCOMPLETE, encoding="ascii")
    on_progress(f"making {folder.name}")
    run_to_end([sys.executable, "-m", "venv", str(folder)], "venv")
    python = existing_environment(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    run_to_end([*pip, "-r", str(requirements.resolve())], "pip")
    stamp.write_text(digest, encoding="ascii")
    return python


def find_environment(
    name: str, requirements: Path, given: Mapping[str, Path], folder: Path, on_progress: Callable[[str], None]
) -> Path:
    """Return the interpreter of the environment that the user named, or of ours in `folder`, made if it is missing."""
    if name in given:
        return existing_environment(given[name].absolute())
    return make_environment(requirements / f"{name}.txt", (folder / name).absolute(), on_progress)


def parse_environments(pairs: Sequence[str], option: str, known: Collection[str]) -> dict[str, Path]:
    """Parse a command line's NAME=DIR pairs.

    Raises:
        InputError: a pair is malformed, or its name is not known.
    """
    parsed = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if name not in known or not folder:
            raise InputError(f"{option} {pair!r}: write NAME=DIR, where NAME is one of {', '.join(sorted(known))}")
        parsed[name] = Path(folder)
    return parsed
