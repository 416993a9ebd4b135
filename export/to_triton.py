"""Bundle to Triton model repository: `python export/to_triton.py BUNDLE --output REPO`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console

from mirror_runtime.bundle import read_manifest
from mirror_runtime.cli.run import run_command
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.plan import read_plan
from mirror_runtime.selection import AUTO
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model.backend_model import ENGINES
from mirror_runtime.triton.repository.container import container_command
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from mirror_runtime.triton.repository.render import write_repository

ROOT = Path(__file__).resolve().parents[1]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE")],
    output: Annotated[Path, typer.Option(help="The model repository; REPO/embed is written.", metavar="REPO")],
    engine: Annotated[str, typer.Option(help="auto, or an engine that the bundle holds, such as openvino.")] = AUTO,
    precision: Annotated[str, typer.Option(help="auto, or a precision that the bundle holds, such as bf16.")] = AUTO,
    streams: Annotated[
        int | None,
        typer.Option(min=1, help="Executions side by side: 2 on 2 cores favours throughput, 1 favours one request."),
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Most texts a request may have.")] = 256,
    long_texts: Annotated[
        LongTexts, typer.Option(help="Texts over the encoder's max_tokens: cut, refused, or averaged over chunks.")
    ] = LongTexts.TRUNCATE,
    instances: Annotated[
        int, typer.Option(min=1, help="Processes that run the model, each on its share of the cores.")
    ] = 1,
    max_tokens_in_flight: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens taken and not answered; more are refused. 32768: 70 requests of 32 sentences.",
        ),
    ] = 32768,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan of the serving machine: engine, precision, streams, rows.", metavar="F"),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="What runs the graph: this project, or one of Triton's own as a second model.")
    ] = Backend.PYTHON,
    cores: Annotated[
        int | None,
        typer.Option(min=1, help="Of the serving machine, for Triton's own backends: the plan's, or ours."),
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Share the bundle's files by hard links where the file system allows it.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the models if they exist.")] = False,
) -> None:
    """Write a Triton model repository that serves a bundle, and print how to start Triton on it."""
    manifest = read_manifest(bundle)
    options = ServingOptions(
        engine=engine,
        precision=precision,
        streams=streams,
        long_texts=long_texts,
        max_batch_size=max_batch_size,
        instances=instances,
        max_tokens_in_flight=max_tokens_in_flight,
        backend=backend,
    )
    if plan is not None:
        followed = read_plan(plan)
        if backend is not Backend.PYTHON and engine == AUTO:
            options = replace(options, engine=ENGINES[backend].value)
        options = options.follow(followed, manifest.fingerprint)
        cores = cores or followed.host.cores
    folder = write_repository(bundle, output, options, link=link, overwrite=overwrite, cores=cores)
    command = container_command(output.resolve(), ROOT, engine=options.engine, backend=backend)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"wrote {folder}", markup=False)
    if backend is Backend.PYTHON:
        console.print(f"serve it on this machine:       mirror serve {shlex.quote(str(bundle))}", markup=False)
    console.print(f"serve it in NVIDIA's container: {command}", markup=False)
    report = {
        "repository": str(output.resolve()),
        "model": MODEL_NAME,
        "dim": manifest.encoder.dim,
        "fingerprint": manifest.fingerprint,
        "max_batch_size": max_batch_size,
        "backend": backend.value,
        "container": command,
    }
    sys.stdout.flush()
    sys.stdout.write(json.dumps(report) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status."""
    return run_command(app, argv, "to_triton.py")


if __name__ == "__main__":
    sys.exit(main())
