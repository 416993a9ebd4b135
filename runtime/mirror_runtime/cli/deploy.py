"""The command `mirror deploy`."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.server.deploy import deploy as deploy_bundle
from mirror_runtime.triton.server.deploy import present_options


def deploy(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE", show_default=False)],
    repository: Annotated[
        Path,
        typer.Option("--to", help="The model repository, made where absent.", metavar="REPO", show_default=False),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            help="auto, or an engine that the bundle holds. Default: as before; so are the others.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, or a precision that the bundle holds.", show_default=False)
    ] = None,
    streams: Annotated[int | None, typer.Option(min=1, help="Executions side by side.", show_default=False)] = None,
    long_texts: Annotated[
        LongTexts | None, typer.Option(help="Texts over the encoder's max_tokens.", show_default=False)
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts an execution.", show_default=False)
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Share the bundle's files by hard links where the file system allows it.")
    ] = False,
) -> None:
    """Replace the model that a repository holds, and that `mirror serve REPO` serves, without an error for anyone.

    The bundle's canaries are checked through the server before clients see the new model, and again after. Exit status
    2 when anything fails: then the old model serves on and the repository is as it was. The version before is kept:
    `mirror deploy REPO/embed/1/bundle --to REPO` goes back to it.
    """
    # A deployment that is told to end takes back what it has done, as it does on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    given: dict[str, Any] = {
        "engine": engine,
        "precision": precision,
        "streams": streams,
        "long_texts": long_texts,
        "max_batch_size": max_batch_size,
    }
    options = replace(
        present_options(repository / MODEL_NAME), **{name: value for name, value in given.items() if value is not None}
    )
    done = deploy_bundle(
        bundle,
        repository,
        options,
        link=link,
        say=lambda line: errors.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False),
    )
    report = {"repository": str(repository), "model": MODEL_NAME, **asdict(done)}
    sys.stdout.write(json.dumps({**report, "seconds": round(done.seconds, 3)}) + "\n")
