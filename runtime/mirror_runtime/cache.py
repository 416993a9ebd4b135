"""Where this user's machine keeps what can be made again: converted graphs and measured plans. A leaf."""

from __future__ import annotations

import os
from pathlib import Path

AUTO_CACHE = "auto"
"""Stands for the user's own cache folder."""


def cache_folder(choice: str | Path | None) -> Path | None:
    """Resolve what a caller said about the cache.

    Args:
        choice: a folder, None for no cache, or "auto" for `mirror-runtime` in the user's cache folder
            (`$XDG_CACHE_HOME`, or `~/.cache`).

    Returns:
        The folder, which need not exist, or None: no cache, or a user without a home, as in some containers.
    """
    if choice is None:
        return None
    if choice != AUTO_CACHE:
        return Path(choice)
    home = os.environ.get("XDG_CACHE_HOME")  # a relative one is to be ignored, says the specification
    try:
        root = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "mirror-runtime"
