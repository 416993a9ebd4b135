"""Encoder to bundle: `python export/to_onnx.py ENCODER --output BUNDLE`."""

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
from rich.table import Table

from export.build import Request, build
from export.texts import read_texts
from mirror_runtime.bundle import Manifest, Pooling, Precision
from mirror_runtime.commandline import application, run_command


def run(
    encoder: Annotated[
        str,
        typer.Argument(
            help="A run folder, a sentence-transformers folder, or a hub name (BERT family).", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="The bundle's folder; it appears whole or not at all.", show_default=False)
    ],
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Such as --precision fp32 bf16. Default: fp32, and bf16 where the CPU has avx512_bf16 or amx_bf16."
        ),
    ] = None,
    pooling: Annotated[
        Pooling | None, typer.Option(help="Needed for an encoder that records none; mean or cls.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=3, help="Replace the recorded limit: with 128, a text of 300 tokens is over it.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of a hub name: branch, tag or commit.", show_default=False)
    ] = None,
    parity_texts: Annotated[
        Path | None,
        typer.Option(help="Prove on these texts, one a line. Default: over 1,000 built-in ones, 2 to 20,000 tokens."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle when the new one is proven.")
    ] = False,
) -> None:
    """Export an encoder to ONNX with its pooled head inside, prove the vectors, and write a bundle.

    MiniLM (22 million parameters) takes about 45 seconds on 2 cores and gives 270 MB: weights, padded and packed graph.
    """
    console = Console(stderr=True, highlight=False)
    request = Request(
        encoder=encoder,
        output=output,
        revision=revision,
        pooling=pooling,
        max_tokens=max_tokens,
        precisions=tuple(precision) if precision else None,
        texts=read_texts(parity_texts) if parity_texts else None,
        overwrite=overwrite,
    )
    began = time.perf_counter()
    with console.status("starting") as status:

        def show(stage: str) -> None:
            status.update(stage)
            console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/]  {stage}")

        manifest = build(request, show)
    seconds = time.perf_counter() - began
    console.print(_table(manifest))
    report = {
        "bundle": str(output),
        "fingerprint": manifest.fingerprint,
        "seconds": round(seconds, 1),
        "artifacts": [
            {
                "engine": a.engine.value,
                "precision": a.precision.value,
                "layout": a.layout.value,
                "min_cosine": a.parity.min_cosine,
            }
            for a in manifest.artifacts
        ],
    }
    sys.stdout.write(json.dumps(report) + "\n")


def _table(manifest: Manifest) -> Table:
    table = Table("engine", "precision", "layout", "worst cosine", "mean cosine", "floor", "texts")
    for a in manifest.artifacts:
        table.add_row(
            a.engine.value,
            a.precision.value,
            a.layout.value,
            f"{a.parity.min_cosine:.7f}",
            f"{a.parity.mean_cosine:.7f}",
            str(a.parity.floor),
            f"{a.parity.texts:,}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 on an error that the message explains."""
    precisions = {"--precision": {precision.value for precision in Precision}}
    return run_command(application(run), argv, "to_onnx.py", lists=precisions)


if __name__ == "__main__":
    sys.exit(main())
