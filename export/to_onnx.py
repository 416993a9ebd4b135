"""Encoder to bundle: `python export/to_onnx.py ENCODER --output BUNDLE`."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    gc.disable()  # imports make half a million objects and no garbage: looking for it takes a third of their time

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from encoders.source import Head
from evaluation.sets import read_sets
from export.bundle.build import Export, Request, build
from export.bundle.head_options import HeadOptions, parse_ditto, parse_layers
from export.bundle.hub import check_hub, push
from export.bundle.words import short_name, summary
from export.proof.proof_texts import read_texts
from mirror_runtime.bundle import Artifact, Pooling, Precision, VectorType
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.host import peak_memory_bytes


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
            help="Such as --precision fp32 bf16 int8. fp32 is always made. Default: bf16 too where the CPU has "
            "avx512_bf16 or amx_bf16."
        ),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option("--pooling", "--head", help="Needed for an encoder that records none.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Average these layers before pooling: 1,-1 are the first and the last, 0 is the embeddings. "
            "Default: the last.",
            show_default=False,
        ),
    ] = None,
    ditto: Annotated[
        str | None,
        typer.Option(
            help="For pooling ditto, LAYER:HEAD whose attention weighs the tokens, from 0: 0:9 for bert-base-uncased.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Text around every text, such as 'query: {text}'. Pooling mask needs one with the mask token: "
            "'This sentence : \"{text}\" means [MASK] .'",
            show_default=False,
        ),
    ] = None,
    whiten: Annotated[
        Path | None,
        typer.Option(
            help="Whiten on this text file, one text a line: vectors get mean 0 and covariance 1 on it, then unit "
            "length. It must have more lines than a vector has components.",
            show_default=False,
        ),
    ] = None,
    whiten_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Directions to keep, such as 256 of 768. Default: all.", show_default=False),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep the first components, such as 128 of 384, for encoders tuned for it (Matryoshka).",
            show_default=False,
        ),
    ] = None,
    vector_type: Annotated[
        VectorType | None,
        typer.Option(
            help="What leaves the graph: with 384 components a vector is 1,536 bytes as float32, 768 as float16, 384 "
            "as int8, 48 as binary. Default: what is recorded, mostly float32.",
            show_default=False,
        ),
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
        typer.Option(help="Prove on these texts, one a line. Default: over 500 built-in ones of 2 to 20,000 tokens."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Find the scales of int8 and fp8 on these texts, one a line: 300 of your own kind are plenty. "
            "Default: built-in ones.",
            show_default=False,
        ),
    ] = None,
    sts: Annotated[
        list[str] | None,
        typer.Option(
            help="Scored pairs, such as --sts stsb-test.tsv: an artifact may lose 0.5 points of Spearman on none.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle when the new one is proven.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Upload the proven bundle to OWNER/NAME, with the token of HF_TOKEN or `hf auth login`.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new hub repository private.")] = False,
) -> None:
    """Export an encoder to ONNX with its pooled head inside, prove the vectors, and write a bundle.

    An artifact that misses its floor is left out. Exit status 1 when --precision named one of them; 2 when there is no
    bundle at all. MiniLM (22 million parameters) takes about 45 seconds on 2 cores and gives 270 MB: weights, padded
    and packed graph.
    """
    console = Console(stderr=True, highlight=False)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    request = Request(
        encoder=encoder,
        output=output,
        revision=revision,
        pooling=pooling,
        head=Head(
            layers=parse_layers(layers) if layers else None,
            ditto=parse_ditto(ditto) if ditto else None,
            template=template,
        ),
        additions=HeadOptions(
            whiten=read_texts(whiten) if whiten else None,
            whiten_dim=whiten_dim,
            dim=dim,
            vector_type=vector_type,
        ),
        max_tokens=max_tokens,
        precisions=tuple(precision) if precision else None,
        calibration=read_texts(calibration) if calibration else None,
        texts=read_texts(parity_texts) if parity_texts else None,
        sets=tuple(found for path in sts or () for found in read_sets(path)),
        overwrite=overwrite,
    )
    began = time.perf_counter()
    export = _built(request, console)
    seconds = time.perf_counter() - began
    console.print(_table(export.manifest.artifacts))
    for entry in export.refused:
        console.print(f"[red]refused:[/] {entry.name}", soft_wrap=True)
        console.print(f"  {entry.reason}", soft_wrap=True, markup=False)
    commit = None
    if push_to_hub is not None:
        console.print(f"pushing to {push_to_hub}")
        commit = push(output, push_to_hub, export.manifest, private=private)
    report = {
        "bundle": str(output),
        "fingerprint": export.manifest.fingerprint,
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(peak_memory_bytes() / 1e6),
        "artifacts": [summary(artifact) for artifact in export.manifest.artifacts],
        "refused": [{"artifact": entry.name, "asked": entry.asked, "reason": entry.reason} for entry in export.refused],
        "commit": commit,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    if any(entry.asked for entry in export.refused):
        raise typer.Exit(1)


def _built(request: Request, console: Console) -> Export:
    """Build with the running stage and its clock on the screen; each finished stage leaves a line."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        running: list[tuple[str, float]] = []
        task = progress.add_task("starting", total=None)

        def finish() -> None:
            for stage, began in running:
                console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/]  {stage}")
            running.clear()

        def begin(stage: str) -> None:
            finish()
            running.append((stage, time.perf_counter()))
            progress.reset(task, description=stage)

        export = build(request, begin)
        finish()
    return export


def _table(artifacts: Sequence[Artifact]) -> Table:
    table = Table("artifact", "MB", "cosine", "floor", "alone", "ranks", "top 10", "STS", padding=(0, 0))
    for artifact in artifacts:
        parity = artifact.parity
        table.add_row(
            short_name(artifact),
            f"{artifact.size / 1e6:.1f}",
            f"{parity.min_cosine:.6f}",
            str(parity.floor),
            f"{parity.neighbour_cosine:.6f}",
            f"{parity.spearman:.4f}",
            f"{parity.top10_overlap:.1%}",
            " ".join(f"{score.artifact - score.reference:+.2f}" for score in parity.sts) or "-",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 on an error that the message explains."""
    lists = {"--precision": {precision.value for precision in Precision}, "--sts": None}
    return run_command(application(run), argv, "to_onnx.py", lists=lists)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
