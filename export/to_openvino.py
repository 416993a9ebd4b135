"""Convert a bundle to OpenVINO IR: `python export/to_openvino.py BUNDLE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console

from evaluation.sets import read_sets
from export.bundle.card import summary
from export.proof.proof_texts import read_texts
from mirror_runtime.bundle import Precision
from mirror_runtime.cli.options import BundleArgument, ProofSetsOption, ProofTextsOption
from mirror_runtime.cli.run import application, print_json, run_command, timestamped_lines


def run(
    bundle: BundleArgument,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="fp32 (padded), bf16 (packed), int8 (both). Default: all that the bundle has and this CPU supports.",
            show_default=False,
        ),
    ] = None,
    parity_texts: ProofTextsOption = None,
    sts: ProofSetsOption = None,
) -> None:
    """Write a bundle's graphs in OpenVINO's own format, prove them, and add them to its manifest.

    The padded graphs have the names that sentence-transformers loads; the packed graphs are used for serving from then
    on. The bundle does not change if anything fails.
    """
    from export.bundle.openvino_ir import add_ir  # imports torch, which --help does not wait for

    artifacts = add_ir(
        bundle,
        tuple(precision) if precision else None,
        texts=read_texts(parity_texts) if parity_texts else None,
        sets=tuple(found for path in sts or () for found in read_sets(path)),
        on_progress=timestamped_lines(Console(stderr=True, highlight=False)),
    )
    print_json({"bundle": str(bundle), "artifacts": [summary(artifact) for artifact in artifacts]})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    lists = {"--precision": {precision.value for precision in Precision}, "--sts": None}
    return run_command(application(run), argv, "to_openvino.py", lists=lists)


if __name__ == "__main__":
    sys.exit(main())
