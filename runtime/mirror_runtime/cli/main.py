"""The `mirror` application: its commands, registered under their names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mirror_runtime import __version__
from mirror_runtime.cli import clone
from mirror_runtime.cli.deploy import deploy
from mirror_runtime.cli.doctor import doctor
from mirror_runtime.cli.encode import encode
from mirror_runtime.cli.gateway import gateway
from mirror_runtime.cli.plan import plan
from mirror_runtime.cli.run import APPEARANCE, run_command
from mirror_runtime.cli.serve import serve
from mirror_runtime.cli.verify import verify

app = typer.Typer(no_args_is_help=True, **APPEARANCE)
for command in (encode, verify, doctor, plan, serve, gateway, deploy):
    app.command()(command)
clone.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mirror {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run the bundles that export/to_onnx.py writes: text to vectors you can prove."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: status 0, 1 when a check failed, 2 on the caller's mistake, 130 when interrupted."""
    return run_command(app, argv, "mirror")
