"""Virtual environments of other libraries: made on demand from pinned requirements, and stamped with their hash."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mirror_runtime.errors import PeerError

STAMP = ".requirements-sha256"
INCOMPLETE = "incomplete"


def environment_python(folder: Path) -> Path:
    """Give the interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def existing_environment(folder: Path) -> Path:
    """Give the interpreter of an environment that the caller made; its content is the caller's affair.

    Raises:
        PeerError: there is none.
    """
    python = environment_python(folder)
    if not python.is_file():
        raise PeerError(f"{folder} is no virtual environment: {python} does not exist")
    return python


def make_environment(requirements: Path, folder: Path, say: Callable[[str], None]) -> Path:
    """Make the environment unless its stamp says that it is there, and give its interpreter.

    The stamp gets its hash last, so an interrupted installation is made anew. Where packages come from is pip's own
    configuration (its configuration files and PIP_ variables).

    Args:
        requirements: pinned, one a line.
        folder: the environment's. It is replaced where its stamp is outdated, and left alone where it has none.
        say: takes a line of progress.

    Raises:
        PeerError: it cannot be made; the message holds the last line of pip's output.
    """
    digest = hashlib.sha256(requirements.read_bytes() + platform.python_version().encode()).hexdigest()
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
        return existing_environment(folder)
    if folder.exists():
        if not stamp.is_file():
            raise PeerError(f"{folder} exists and was not made by this program: move it, or name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    stamp.write_text(INCOMPLETE, encoding="ascii")
    say(f"making {folder.name}")
    _run([sys.executable, "-m", "venv", str(folder)], say)
    python = environment_python(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    _run([*pip, "-r", str(requirements)], say)
    stamp.write_text(digest, encoding="ascii")
    return python


def _run(command: list[str], say: Callable[[str], None]) -> None:
    """Run a command, passing its lines on as progress."""
    last = ""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with process:
        assert process.stdout is not None  # PIPE
        for line in process.stdout:
            if line.strip():
                last = line.strip()
                say(last)
    if process.returncode != 0:
        raise PeerError(f"the environment cannot be made (status {process.returncode}): {last}")
