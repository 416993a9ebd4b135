"""The entry point of the `mirror` command. It checks the command line's own packages before anything imports them."""

from __future__ import annotations

import sys

from mirror_runtime.errors import MirrorError
from mirror_runtime.extras import require


def main() -> int:
    """Run the command line, or print which package is missing. Return the exit status."""
    try:
        for package in ("typer", "rich"):
            require(package, "cli")
    except MirrorError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    from mirror_runtime.cli.main import main as run

    return run()
