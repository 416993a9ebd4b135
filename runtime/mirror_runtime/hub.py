"""Published bundles by name: downloaded from a model hub at a revision, and checked against their hashes."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from mirror_runtime.bundle import check_files, read_manifest
from mirror_runtime.errors import BundleError, MissingExtra, install_command, one_line
from mirror_runtime.extras import require

_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_log = logging.getLogger(__name__)


def local_bundle(bundle: str | Path) -> Path:
    """Return a bundle's folder. What is not a path here but reads `OWNER/NAME@REVISION` is downloaded.

    Only a commit as the revision names the same bundle for ever; for any other, a warning tells the commit.

    Raises:
        BundleError: the revision is missing; or the hub has no such bundle, cannot be reached, or its files differ from
            the manifest's hashes.
    """
    path = Path(bundle)
    found = _NAME.fullmatch(str(bundle))
    if path.exists() or found is None:
        return path
    name, revision = found.groups()
    if revision is None:  # a mistyped path must not ask a hub, where anybody may own such a name
        raise BundleError(f"{bundle} is not a bundle: no such folder. A published one is {bundle}@COMMIT, of a hub")
    try:
        hub = require("huggingface_hub", "hub")
    except MissingExtra as error:
        raise BundleError(f"{bundle} is not a folder here; to load it from a hub: {install_command('hub')}") from error
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, endpoint=os.environ.get("HF_ENDPOINT")))
    except Exception as error:  # the hub's errors, and those of its HTTP library, which differ between its releases
        problem = f"{bundle} is neither a folder here nor a bundle that the hub gives: {one_line(error)}"
        raise BundleError(problem) from error
    check_files(folder, read_manifest(folder))
    if not _COMMIT.fullmatch(revision):
        _log.warning("%s is at commit %s today: pin it with %s@%s", bundle, folder.name, name, folder.name)
    return folder
