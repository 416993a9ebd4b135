"""Progress lines of the commands that add artifacts to a bundle."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console


def progress_lines() -> Callable[[str], None]:
    """Return a callback that prints lines to standard error, each after the seconds since this call."""
    console = Console(stderr=True, highlight=False)
    began = time.perf_counter()
    return lambda line: console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/]  {line}")
