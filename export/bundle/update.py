"""Add artifacts to an existing bundle, on the machine that they are for. The manifest is written last."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from encoders.card import CARD_FILE
from export.bundle.card import write_card
from mirror_runtime.bundle import MANIFEST_FILE, Artifact, read_manifest, sha256_file, write_json
from mirror_runtime.errors import InputError
from mirror_runtime.folders import named_os_errors


@contextmanager
def updating(bundle: Path) -> Iterator[Path]:
    """Yield an empty folder inside a bundle for new files; it is removed when the block ends.

    Raises:
        InputError: the bundle cannot be written, or another process is adding to it.
    """
    with ExitStack() as at_end:
        try:
            handle = os.open(bundle, os.O_RDONLY)
            at_end.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in bundle.glob(".partial-*"):  # left by killed processes: this one holds the lock
                shutil.rmtree(left)
            folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=bundle))
        except BlockingIOError:
            raise InputError(f"another process is adding to {bundle}: wait for it") from None
        except OSError as error:
            raise InputError(f"{bundle} cannot be written: {error.strerror}") from error
        at_end.callback(shutil.rmtree, folder, ignore_errors=True)
        with named_os_errors(bundle):
            yield folder


def add_artifacts(bundle: Path, staging: Path, artifacts: Sequence[Artifact], *, instead_of: str | None = None) -> None:
    """Move new files into a bundle, and add them and their artifacts to its manifest, which is written last.

    The files of `staging`, the folder from `updating`, move to the same relative paths in the bundle. Each artifact
    replaces one of the same engine, precision and layout. Files whose paths begin with `instead_of` leave the manifest.

    Raises:
        InputError: the bundle cannot be written.
    """
    manifest = read_manifest(bundle)
    files = {k: v for k, v in manifest.files.items() if instead_of is None or not k.startswith(instead_of)}
    new = {(a.engine, a.precision, a.layout) for a in artifacts}
    kept = tuple(a for a in manifest.artifacts if (a.engine, a.precision, a.layout) not in new)
    updated = dataclasses.replace(manifest, artifacts=(*kept, *artifacts))
    with named_os_errors(bundle):
        if (bundle / CARD_FILE).is_file():
            shutil.copyfile(bundle / CARD_FILE, staging / CARD_FILE)
            write_card(staging, updated, bundle)
        new_files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
        files |= {relative.as_posix(): sha256_file(staging / relative) for relative in new_files}
        # Everything is on the disk before the first file moves: a full disk leaves the old bundle.
        write_json(dataclasses.replace(updated, files=files), staging / MANIFEST_FILE)
        for relative in (*new_files, Path(MANIFEST_FILE)):
            (bundle / relative).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / relative, bundle / relative)
