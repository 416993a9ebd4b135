"""The disk space of packages. Runs in peers' environments, too: imports only the standard library."""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

INSTALLERS = frozenset({"pip", "setuptools", "wheel"})
"""In every environment, and not needed by the programs that run there."""


def installed_bytes(names: Collection[str] | None = None) -> int:
    """Add up the files of installed packages, compiled Python included.

    Args:
        names: of the packages; None for all of this environment except the installers.
    """
    total = 0
    for package in metadata.distributions():
        name = normal(package.metadata["Name"])
        if name in INSTALLERS if names is None else name not in names:
            continue
        for file in package.files or ():
            path = Path(str(package.locate_file(file)))
            if path.is_file():
                total += path.stat().st_size
    return total


def normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    sys.stdout.write(f"{installed_bytes()}\n")
