"""MkDocs hook: put each command's own help where a page says `{{ help: COMMAND }}`.

The text comes from the program, so the reference cannot drift from it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MARKER = re.compile(r"^\{\{ help: (.+?) \}\}$", re.MULTILINE)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each marker by the command's `--help`, as plain text 78 columns wide. Called by MkDocs."""
    return _MARKER.sub(lambda found: f"```text\n{_help(found[1])}\n```", markdown)


def _help(command: str) -> str:
    """Run `COMMAND --help` and return what it prints.

    Raises:
        RuntimeError: the command failed.
    """
    words = command.split()
    program = [sys.executable, "-m", "mirror_runtime.cli"] if words[0] == "mirror" else [sys.executable]
    arguments = words[1:] if words[0] in ("mirror", "python") else words
    environment = os.environ | {"COLUMNS": "78", "NO_COLOR": "1", "TERM": "dumb", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    done = subprocess.run(
        [*program, *arguments, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command} --help ended with {done.returncode}: {done.stderr}")
    return _STYLE.sub("", done.stdout).strip("\n")
