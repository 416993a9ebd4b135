"""The command `mirror deploy`."""

from __future__ import annotations

import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mirror_runtime.cli.options import (
    BundleArgument,
    ChangedEngineOption,
    ChangedInvariantOption,
    ChangedLongTextsOption,
    ChangedMaxBatchSizeOption,
    ChangedPrecisionOption,
    ChangedStreamsOption,
    DimensionsOption,
    LinkOption,
)
from mirror_runtime.cli.run import print_json, timestamped_lines
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.serving_process import stop_signals_handled
from mirror_runtime.triton.server.deploy import deploy as deploy_bundle
from mirror_runtime.triton.server.deploy import present_options


def deploy(
    bundle: BundleArgument,
    repository: Annotated[
        Path, typer.Option("--to", help="The model repository; created if missing.", metavar="REPO", show_default=False)
    ],
    engine: ChangedEngineOption = None,
    precision: ChangedPrecisionOption = None,
    streams: ChangedStreamsOption = None,
    long_texts: ChangedLongTextsOption = None,
    max_batch_size: ChangedMaxBatchSizeOption = None,
    dimensions: DimensionsOption = None,
    invariant: ChangedInvariantOption = None,
    link: LinkOption = False,
) -> None:
    """Replace the model that a repository holds, and that `mirror serve REPO` serves, without an error for any client.

    Options that are left out stay as they are in the repository, except --dimensions. The bundle's canaries are checked
    through the server before clients see the new model, and again after. If anything fails, the exit status is 2, the
    old model stays in service and the repository is as it was. The previous version is kept: `mirror deploy
    REPO/embed/1/bundle --to REPO` goes back to it.
    """
    options: dict[str, Any] = {
        "engine": engine,
        "precision": precision,
        "streams": streams,
        "long_texts": long_texts,
        "max_batch_size": max_batch_size,
        "dimensions": tuple(dimensions) if dimensions else None,
        "invariant": invariant,
    }
    changes = {name: value for name, value in options.items() if value is not None}
    # Signals undo an unfinished deployment, as Ctrl-C does. What a killed one leaves, the next one clears.
    with stop_signals_handled(signal.default_int_handler):
        done = deploy_bundle(
            bundle,
            repository,
            replace(present_options(repository / MODEL_NAME), **changes),
            link=link,
            on_progress=timestamped_lines(Console(stderr=True, highlight=False, soft_wrap=True)),
        )
    report = {"repository": str(repository), "model": MODEL_NAME, **asdict(done)}
    print_json({**report, "seconds": round(done.seconds, 3)})
