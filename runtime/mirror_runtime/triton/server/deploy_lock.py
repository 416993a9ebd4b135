"""One deployment at a time into a model repository, visible to the process that serves it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mirror_runtime.errors import InputError, ServerError
from mirror_runtime.triton.server.control import Access

ACCESS_FILE = ".mirror-serve.json"
LOCK_FILE = ".mirror-deploy.lock"

_POLL_S = 0.02
_TRIES = 25


@contextlib.contextmanager
def deploying(repository: Path) -> Iterator[None]:
    """Lock a repository for one deployment. The lock ends with the process, even if it is killed."""
    try:
        handle = os.open(repository / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(f"{repository} cannot be written: {error.strerror}") from error
    try:
        if not _try_lock(handle, fcntl.LOCK_EX):
            raise InputError(f"another process deploys into {repository}: wait for it")
        try:
            yield
        finally:
            os.utime(handle)  # for the server's watchdog, in case it has not seen the lock itself
    finally:
        os.close(handle)


class DeployLock:
    """Lets the server's watchdog see deployments, which replace models on purpose."""

    def __init__(self, repository: Path) -> None:
        self._lock = repository / LOCK_FILE
        self._seen_ns = self._modified_ns()

    def changed(self) -> bool:
        """Return whether a deployment is under way, or has ended since the last call."""
        try:
            handle = os.open(self._lock, os.O_RDONLY)
        except OSError:  # there has never been a deployment
            return False
        try:
            under_way = not _try_lock(handle, fcntl.LOCK_SH)
        finally:
            os.close(handle)
        before, self._seen_ns = self._seen_ns, self._modified_ns()
        return under_way or self._seen_ns != before

    def _modified_ns(self) -> int:
        try:
            return self._lock.stat().st_mtime_ns
        except OSError:
            return 0


class ServerFile:
    """The file in a repository that tells `mirror deploy` which server serves it. A context manager.

    It contains the server's key, so only its owner may read it. It is locked while the process that wrote it lives. An
    OSError means that the repository cannot be written; then deployments cannot reach this server.
    """

    def __init__(self, repository: Path) -> None:
        self._path = repository / ACCESS_FILE
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        if not _try_lock(self._handle, fcntl.LOCK_EX):
            os.close(self._handle)
            raise InputError(f"another mirror serve runs on {repository}: stop it first")
        os.ftruncate(self._handle, 0)

    def write(self, access: Access) -> None:
        """Write the address and key of the server."""
        content = json.dumps(asdict(access)).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content, 0)

    def __enter__(self) -> ServerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._handle)


def find_server(repository: Path) -> Access | None:
    """Return the server that serves a repository, None if there is none; raise if it is starting or not ours."""
    path = repository / ACCESS_FILE
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ServerError(f"another user owns the server of {repository}: {path}: {error.strerror}") from error
    try:
        if _try_lock(handle, fcntl.LOCK_SH):
            return None  # a killed process left the file
        content = os.pread(handle, 4096, 0)
    finally:
        os.close(handle)
    if not content:
        raise ServerError(f"the server of {repository} is starting: try again when it serves")
    return Access(**json.loads(content))


def _try_lock(handle: int, kind: int) -> bool:
    """Try to lock a file, and retry an exclusive lock: checks hold a shared lock for a moment."""
    for _ in range(_TRIES if kind == fcntl.LOCK_EX else 1):
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL_S)
        else:
            return True
    return False
