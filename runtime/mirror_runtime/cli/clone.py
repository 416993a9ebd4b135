"""The commands of a clone under `mirror`: each is a script of the repository, which the wheel does not contain."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer

import mirror_runtime
from mirror_runtime.errors import MirrorError

SCRIPTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "tune": ("training/tune.py", "Tune an encoder on your text. (clone)"),
        "evaluate": ("training/evaluate.py", "Measure encoders, on labels or on your text alone. (clone)"),
        "export": ("export/to_onnx.py", "Write a bundle: ONNX graphs and their certificates. (clone)"),
        "front": ("export/front.py", "Make faster forms of an encoder, and draw speed against quality. (clone)"),
        "shrink": ("training/shrink.py", "Leave out layers and tokens of an encoder. (clone)"),
        "twin": ("training/twin.py", "Make a static twin of an encoder, in its vector space. (clone)"),
        "pair": ("export/pair.py", "Put an encoder and its twin into one bundle. (clone)"),
    }
)
"""The script behind each command, and what it does."""

ARGUMENTS: Mapping[str, Any] = MappingProxyType(
    {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
"""Settings with which all arguments, `--help` too, reach the script."""


def script_of(command: str) -> Path:
    """Return the script behind a command; MirrorError if this package was not installed from a clone."""
    root = Path(mirror_runtime.__file__).resolve().parents[2]
    script = root / SCRIPTS[command][0]
    if not script.is_file():
        raise MirrorError(
            f"`mirror {command}` runs {SCRIPTS[command][0]} of a clone, and this mirror_runtime is not part of one "
            f"({root}): clone the repository, run `make setup` there, and use .venv/bin/mirror"
        )
    return script


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    for name, (_, text) in SCRIPTS.items():
        app.command(name, help=text, context_settings=dict(ARGUMENTS))(_command(name))


def _command(name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        # The script takes this process's place, so that signals and the exit status are its own.
        os.execv(sys.executable, [sys.executable, str(script_of(name)), *context.args])

    return run
