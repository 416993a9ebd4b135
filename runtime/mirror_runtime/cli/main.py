"""The `mirror` application: its commands, registered under their names."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from mirror_runtime.cli.deploy import deploy
from mirror_runtime.cli.doctor import doctor
from mirror_runtime.cli.encode import encode
from mirror_runtime.cli.gateway import gateway
from mirror_runtime.cli.plan import plan
from mirror_runtime.cli.run import run_command
from mirror_runtime.cli.serve import serve
from mirror_runtime.cli.verify import verify

app = typer.Typer(
    help="Text to vectors you can prove: run the bundles that export/to_onnx.py writes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (encode, verify, doctor, plan, serve, gateway, deploy):
    app.command()(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: status 0, 1 when a check failed, 2 on the caller's mistake, 130 when interrupted."""
    return run_command(app, argv, "mirror")
