"""Folders and files that appear whole or not at all. A leaf: imports only `errors`."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mirror_runtime.errors import InputError, MirrorError, one_line

_NUMBER = re.compile(r"(?:\(os error |\[Errno )(\d+)[\])]")
"""The number of an operating system's error in the message of a library in Rust, and in that of Python."""


@contextmanager
def whole_folder(output: Path, *, overwrite: bool = False, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `output` which is renamed to `output` if the block succeeds, and removed otherwise.

    A killed process leaves a hidden `.NAME.partial-*` folder, which the next call for the same output removes. A lock,
    which is released when its process ends, keeps two processes from writing the same output at once. An existing
    folder stays unchanged until the new one is complete, and is never replaced without the file `marker`, which every
    such folder contains.

    Raises:
        InputError: `output` exists and `overwrite` is not set, cannot be written, or is being written. Also for an
            OSError of the block, such as a full disk.
    """
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError(f"{output} is not empty: choose another --output, or --overwrite to replace it")
    if output.is_dir() and any(output.iterdir()) and not (output / marker).is_file():
        raise InputError(
            f"{output} holds something else (it has no {marker}) and is not replaced: choose another --output"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        alone = _lock(output.parent, fcntl.LOCK_EX)  # others must not remove this folder before it is locked
        try:
            _remove_stale(output)
            partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
            lock = _lock(partial)
        finally:
            os.close(alone)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from error
    try:
        with named_os_errors(output, partial):
            partial.chmod(0o777 & ~umask())  # mkdtemp makes it private, but a model server may run as another user
            yield partial
            _publish(partial, output)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replace_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and rename it to `path` in one step if the block succeeds.

    If the block fails, the new file is removed and an earlier one stays unchanged; an OSError becomes an `InputError`.
    A `shared` file may be written by several processes at once, each under a name of its own, which a killed process
    leaves behind. Otherwise the name is fixed, and the next writer overwrites it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    try:
        with named_os_errors(path, beside):
            yield beside
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def named_os_errors(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Turn an OSError of the block into an `InputError` that names the file, or else `path`, and the cure.

    Also what a library written in Rust raises for one. `beside` is what the block writes in the place of `path`; the
    caller does not know that name.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MirrorError) or not (isinstance(error, OSError) or _NUMBER.search(str(error))):
            raise
        message = os_error_message(error, path)
        raise InputError(message.replace(str(beside), str(path)) if beside else message) from error


def os_error_message(error: Exception, path: object = "") -> str:
    """Describe an error of the operating system: the file, the reason, and the cure where there is a usual one."""
    cures = {
        errno.ENOSPC: "free some space and run the command again",
        errno.EDQUOT: "free some of your quota and run the command again",
        errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the command again",
        errno.EACCES: "check its permissions",
        errno.EROFS: "choose a place that can be written",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
        errno.ENOENT: "check the path",
    }
    text, number, reason, file = str(error), 0, "", None
    if isinstance(error, shutil.Error) and isinstance(
        error.args[0], list
    ):  # of copytree, which lists sources, targets and texts
        _, file, text = error.args[0][0]
    elif isinstance(error, OSError):
        number, reason = error.errno or 0, error.strerror or ""
        file = error.filename2 or error.filename  # of a copy the target comes second
    if not number and (found := _NUMBER.search(text)):
        number = int(found[1])
        reason = os.strerror(number)
    where = f"{file or path}: " if file or path else ""
    cure = f" ({cures[number]})" if number in cures else ""
    return f"{where}{reason or one_line(text) or type(error).__name__}{cure}"


def umask() -> int:
    """Return the permission bits that this process removes from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _lock(folder: Path, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    """Lock the folder itself, so that it stays empty, and return the handle that holds the lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, kind)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_stale(output: Path) -> None:
    """Remove the folders of killed processes; raise an error if one is still running."""
    for left in output.parent.glob(f".{output.name}.partial-*"):
        try:
            lock = _lock(left)
        except BlockingIOError:
            raise InputError(f"another process is writing {output}: wait for it or choose another --output") from None
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def _publish(partial: Path, output: Path) -> None:
    """Rename the folder. A directory cannot be replaced in one step, so the old one is moved away first."""
    if not output.exists():
        os.rename(partial, output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    os.rename(output, aside / output.name)
    os.rename(partial, output)
    shutil.rmtree(aside)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder of unfinished work if needed, and lock it for this process.

    The lock is released when the process ends, even if it is killed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is writing {folder.name}: wait for it or choose another output"
            ) from None
        yield
