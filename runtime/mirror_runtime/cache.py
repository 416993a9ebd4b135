"""The user's cache folder, for converted graphs and measured plans. A leaf."""

from __future__ import annotations

import os
from pathlib import Path

AUTO_CACHE = "auto"
"""Means the user's own cache folder."""


def cache_folder(choice: str | Path | None) -> Path | None:
    """Return the folder of a caller's choice: a folder, None for no cache, or "auto".

    "auto" is `mirror-runtime` in the user's cache folder (`$XDG_CACHE_HOME`, or `~/.cache`), which need not exist, or
    None if the user has no home, as in some containers.
    """
    if choice is None:
        return None
    if choice != AUTO_CACHE:
        return Path(choice)
    home = os.environ.get("XDG_CACHE_HOME")  # the specification says to ignore a relative one
    try:
        root = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "mirror-runtime"
