"""Where the `mirror` command begins: says which extra is missing before anything needs it."""

from __future__ import annotations

import sys

from mirror_runtime.errors import MirrorError
from mirror_runtime.extras import require


def main() -> int:
    """Run the command line, or say that its packages are not installed; gives the exit status."""
    try:
        for package in ("typer", "rich"):
            require(package, "cli")
    except MirrorError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    from mirror_runtime.cli.main import main as run

    return run()
