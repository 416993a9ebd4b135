"""One deployment at a time into a model repository, and the way to the server that serves it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.errors import InputError, ServerError
from mirror_runtime.triton.server.control import Access

ACCESS_FILE = ".mirror-serve.json"
LOCK_FILE = ".mirror-deploy.lock"
REPLACED = "replaced"
CANDIDATE_NAME = "embed_candidate"
"""Name of a model that is tried before it serves. A folder of this name, left by a killed deployment, is not loaded."""

_POLL_S = 0.02
_TRIES = 25


@contextlib.contextmanager
def deploying(repository: Path) -> Iterator[Path]:
    """Lock a repository for one deployment and yield its scratch folder, empty; a killed one's is cleared first.

    The folder lies beside the repository: a server that loads all models would load one inside it. In its folder
    `replaced` the deployment keeps the model that it replaces.
    """
    scratch = _scratch(repository)
    with _locked(repository):
        _clear(repository)
        try:
            scratch.mkdir(mode=0o700)
        except OSError as error:
            raise InputError(f"{scratch.parent} cannot be written: {error.strerror}") from error
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def clear_killed(repository: Path) -> bool:
    """Clear what a killed deployment has left in and beside a repository; return whether there was anything.

    Afterwards the repository contains the model from before, or the new one.
    """
    if not (_scratch(repository).exists() and (repository / LOCK_FILE).exists()):
        return False
    try:
        with _locked(repository, tries=1):
            _clear(repository)
    except (InputError, OSError):  # the deployment is under way, or it cannot be cleared
        return False
    return not _scratch(repository).exists()


def _clear(repository: Path) -> None:
    model, replaced = repository / MODEL_NAME, _scratch(repository) / REPLACED
    if replaced.exists() and not model.exists():
        os.rename(replaced, model)
    shutil.rmtree(repository / CANDIDATE_NAME, ignore_errors=True)
    shutil.rmtree(_scratch(repository), ignore_errors=True)


def _scratch(repository: Path) -> Path:
    place = repository.resolve()
    return place.with_name(f".{place.name}.mirror-deploy")


@contextlib.contextmanager
def _locked(repository: Path, tries: int = _TRIES) -> Iterator[None]:
    """Hold the lock, which ends with the process, even if it is killed."""
    try:
        handle = os.open(repository / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(f"{repository} cannot be written: {error.strerror}") from error
    try:
        if not _try_lock(handle, fcntl.LOCK_EX, tries):
            raise InputError(f"another process deploys into {repository}: wait for it")
        yield
    finally:
        os.close(handle)


class ServerFile:
    """The file in a repository that tells `mirror deploy` which server serves it. A context manager.

    It contains the server's key, so only its owner may read it. It is locked while the process that wrote it lives. An
    OSError means that the repository cannot be written; then deployments cannot reach this server.
    """

    def __init__(self, repository: Path) -> None:
        self._path = repository / ACCESS_FILE
        while True:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            if not _try_lock(self._handle, fcntl.LOCK_EX, _TRIES):
                os.close(self._handle)
                raise InputError(f"another mirror serve runs on {repository}: stop it first")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._handle), os.stat(self._path)):
                    break
            os.close(self._handle)  # the server before this one has removed the file meanwhile
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


def _try_lock(handle: int, kind: int, tries: int = 1) -> bool:
    """Try to lock a file, and try again where others hold the lock for a moment to check it."""
    for _ in range(tries):
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL_S)
        else:
            return True
    return False
