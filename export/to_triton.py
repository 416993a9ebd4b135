"""Write a Triton model repository from a bundle: `python export/to_triton.py BUNDLE --output REPO`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console

from mirror_runtime.bundle import read_manifest
from mirror_runtime.cli.options import (
    BundleArgument,
    DimensionsOption,
    EngineOption,
    InstancesOption,
    InvariantOption,
    LinkOption,
    LongTextsOption,
    MaxBatchSizeOption,
    MaxTokensInFlightOption,
    PrecisionOption,
    StreamsOption,
)
from mirror_runtime.cli.run import application, print_json, run_command
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.plan import read_plan
from mirror_runtime.selection import AUTO
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.repository.container import container_command
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from mirror_runtime.triton.repository.render import write_repository

ROOT = Path(__file__).resolve().parents[1]


def run(
    bundle: BundleArgument,
    output: Annotated[
        Path, typer.Option(help="The model repository; REPO/embed is written.", metavar="REPO", show_default=False)
    ],
    engine: EngineOption = AUTO,
    precision: PrecisionOption = AUTO,
    streams: StreamsOption = None,
    max_batch_size: MaxBatchSizeOption = 256,
    long_texts: LongTextsOption = LongTexts.TRUNCATE,
    instances: InstancesOption = 1,
    max_tokens_in_flight: MaxTokensInFlightOption = 32768,
    dimensions: DimensionsOption = None,
    invariant: InvariantOption = False,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan of the serving machine: engine, precision, streams, rows.", metavar="F"),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="What runs the graph: this project, or one of Triton's own as a second model.")
    ] = Backend.PYTHON,
    cores: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cores of the serving machine, for Triton's own backends. Default: those in the plan, else this "
            "machine's.",
        ),
    ] = None,
    link: LinkOption = False,
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
        dimensions=tuple(dimensions or ()),
        invariant=invariant,
    )
    if plan is not None:
        serving_plan = read_plan(plan)
        if backend is not Backend.PYTHON and engine == AUTO:
            options = replace(options, engine=backend.value)
        options = options.follow(serving_plan, manifest.fingerprint)
        cores = cores or serving_plan.host.cores
    folder = write_repository(bundle, output, options, link=link, overwrite=overwrite, cores=cores)
    command = container_command(output.resolve(), ROOT, engine=options.engine, backend=backend)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"wrote {folder}", markup=False)
    if backend is Backend.PYTHON:
        console.print(f"serve it on this machine:       mirror serve {shlex.quote(str(bundle))}", markup=False)
    console.print(f"serve it in NVIDIA's container: {command}", markup=False)
    sys.stdout.flush()
    print_json(
        {
            "repository": str(output.resolve()),
            "model": MODEL_NAME,
            "dim": manifest.encoder.dim,
            "fingerprint": manifest.fingerprint,
            "max_batch_size": max_batch_size,
            "backend": backend.value,
            "container": command,
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    return run_command(application(run), argv, "to_triton.py")


if __name__ == "__main__":
    sys.exit(main())
