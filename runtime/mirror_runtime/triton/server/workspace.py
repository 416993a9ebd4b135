"""Temporary files that prove whose they are, so that the next process can remove what a killed one has left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from mirror_runtime.triton.server.processes import kill_all, tritons

SHARED_MEMORY = Path("/dev/shm")

_PREFIX = "mirror-serve-"
_TRITONS_FOLDERS = Path("/tmp")
"""Here Triton makes an empty folder for its Python backend, whatever TMPDIR says."""

_ENVIRONMENT = "python_env_*"


class Workspace:
    """A temporary folder, locked while this process lives. Making one clears those of processes that were killed.

    Attributes:
        folder: the folder.
        token: part of the folder's name. A server whose command line contains it, and shared memory of the prefix
            `mirror_TOKEN_`, belong to this workspace.
    """

    def __init__(self) -> None:
        _clear_abandoned()
        self.token = f"{os.getpid()}_{secrets.token_hex(4)}"
        # It gets the name by which others find it when it is locked.
        unlocked = Path(tempfile.mkdtemp(prefix=".mirror-"))
        self._lock = _lock(unlocked)
        self.folder = unlocked.rename(unlocked.with_name(f"{_PREFIX}{self.token}"))
        self._others = _python_environments()
        self._claimed = False

    def claim_python_environment(self) -> None:
        """Record the folder that the Python backend of this workspace's server has made, once it runs a model.

        If other servers have made theirs meanwhile, nobody can tell which is whose, and a kill may leave it behind.
        """
        new = _python_environments() - self._others
        if len(new) == 1 and not self._claimed:
            path = new.pop()
            (self.folder / path.name).symlink_to(path)
            self._claimed = True

    def close(self) -> None:
        """Kill what runs in the workspace and remove it."""
        _remove(self.folder)
        os.close(self._lock)


def _clear_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if not _ours(folder):
                continue
            lock = _lock(folder)
        except OSError:  # its process lives, or another one has just removed it
            continue
        _remove(folder)
        os.close(lock)


def _lock(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove(folder: Path) -> None:
    token = folder.name.removeprefix(_PREFIX)
    kill_all(lambda: tritons(token))
    for region in SHARED_MEMORY.glob(f"mirror_{token}_*"):
        region.unlink(missing_ok=True)
    for link in folder.glob(_ENVIRONMENT):
        with contextlib.suppress(OSError):  # Triton has removed it, or somebody has filled it
            link.readlink().rmdir()
    shutil.rmtree(folder, ignore_errors=True)


def _python_environments() -> set[Path]:
    """Return this user's folders of Python backends."""
    found = set()
    for folder in _TRITONS_FOLDERS.glob(_ENVIRONMENT):
        with contextlib.suppress(OSError):  # it has just gone
            if _ours(folder):
                found.add(folder)
    return found


def _ours(path: Path) -> bool:
    return path.lstat().st_uid == os.geteuid()
