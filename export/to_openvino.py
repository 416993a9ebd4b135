"""Bundle to OpenVINO IR: `python export/to_openvino.py BUNDLE`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console

from evaluation.sets import read_sets
from export.bundle.openvino_ir import FILES, add_ir
from export.proof.proof_texts import read_texts
from mirror_runtime.bundle import Precision
from mirror_runtime.cli.run import application, run_command


def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE", show_default=False)],
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="fp32 (padded), bf16 (packed), int8 (both). Default: what the bundle holds and this CPU runs.",
            show_default=False,
        ),
    ] = None,
    parity_texts: Annotated[
        Path | None,
        typer.Option(help="Prove on these texts, one a line. Default: over 500 built-in ones, 2 to 20,000 tokens."),
    ] = None,
    sts: Annotated[
        list[str] | None,
        typer.Option(help="Scored pairs: an artifact may lose 0.5 points of Spearman on none.", show_default=False),
    ] = None,
) -> None:
    """Write a bundle's graphs in OpenVINO's own format, prove them, and enter them in its manifest.

    The padded ones have the names that sentence-transformers loads; the packed ones serve from then on. Where anything
    fails the bundle stays as it was.
    """
    console = Console(stderr=True, highlight=False)
    began = time.perf_counter()

    def show(stage: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/]  {stage}")

    artifacts = add_ir(
        bundle,
        tuple(precision) if precision else None,
        texts=read_texts(parity_texts) if parity_texts else None,
        sets=tuple(found for path in sts or () for found in read_sets(path)),
        on_stage=show,
    )
    rows = [
        {
            "path": artifact.path,
            "precision": artifact.precision.value,
            "layout": artifact.layout.value,
            "size": artifact.size,
            "min_cosine": artifact.parity.min_cosine,
            "neighbour_cosine": artifact.parity.neighbour_cosine,
        }
        for artifact in artifacts
    ]
    sys.stdout.write(json.dumps({"bundle": str(bundle), "artifacts": rows}) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 on an error that the message explains."""
    return run_command(
        application(run), argv, "to_openvino.py", lists={"--precision": {p.value for p in FILES}, "--sts": None}
    )


if __name__ == "__main__":
    sys.exit(main())
