"""Command-line options and arguments that appear in more than one command, each defined once.

A command annotates its parameter with one of these types and sets the default itself. The `Changed…` variants have no
default of their own: `mirror deploy` keeps what the repository already says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from typer.models import OptionInfo

from mirror_runtime.bundle import EngineName, Pooling, Precision
from mirror_runtime.hub import local_bundle
from mirror_runtime.tokenizer import LongTexts

_ENGINES = ", ".join(engine.value for engine in EngineName if engine is not EngineName.FAKE)
_PRECISIONS = ", ".join(precision.value for precision in Precision)

_ENGINE = typer.Option(help=f"auto, or an engine that the bundle holds: {_ENGINES}. A named engine runs or fails.")
_PRECISION = typer.Option(help=f"auto, or a precision that the bundle holds: {_PRECISIONS}.")
_STREAMS = "Batches in flight: 1 favours a lone request, more favour throughput."
_LONG_TEXTS = typer.Option(
    help="Texts over the encoder's limit. With a limit of 256, a text of 600 tokens gives one truncated vector, an "
    "error, or the vectors of three chunks, joined by their mean, by tokens or by the largest."
)
_INVARIANT = "Make a text's vector equal to the bit whatever its neighbours, at about 0.6 of the throughput."
_MAX_BATCH_SIZE = typer.Option(min=1, help="Maximum texts per request.")


def port_option(server: str) -> OptionInfo:
    """Build the option for a port to listen on; `server` is what listens, such as "HTTP"."""
    option: OptionInfo = typer.Option(min=0, max=65535, help=f"{server} port; 0 picks a free one.")
    return option


# What is encoded, and how.
BundleArgument: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE",
        help="The bundle's folder, as export/to_onnx.py wrote it, or OWNER/NAME@COMMIT of a hub.",
        show_default=False,
        callback=local_bundle,
    ),
]
EngineOption: TypeAlias = Annotated[str, _ENGINE]
PrecisionOption: TypeAlias = Annotated[str, _PRECISION]
StreamsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1, help=f"{_STREAMS} Default: the engine's choice; with 8 cores, 8 for openvino and 1 for onnxruntime."
    ),
]
LongTextsOption: TypeAlias = Annotated[LongTexts, _LONG_TEXTS]
InvariantOption: TypeAlias = Annotated[bool, typer.Option("--invariant", help=_INVARIANT)]
ColumnOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--column", "--text-column", help="Column or field of the text; a dot leads into an object: meta.text."
    ),
]

# How it is served.
ChangedEngineOption: TypeAlias = Annotated[str | None, _ENGINE]
ChangedPrecisionOption: TypeAlias = Annotated[str | None, _PRECISION]
ChangedStreamsOption: TypeAlias = Annotated[int | None, typer.Option(min=1, help=_STREAMS)]
ChangedLongTextsOption: TypeAlias = Annotated[LongTexts | None, _LONG_TEXTS]
ChangedInvariantOption: TypeAlias = Annotated[bool | None, typer.Option("--invariant/--no-invariant", help=_INVARIANT)]
ChangedMaxBatchSizeOption: TypeAlias = Annotated[int | None, _MAX_BATCH_SIZE]
MaxBatchSizeOption: TypeAlias = Annotated[int, _MAX_BATCH_SIZE]
MaxTokensInFlightOption: TypeAlias = Annotated[
    int,
    typer.Option(
        min=1,
        help="Maximum tokens accepted and not yet answered; further requests are refused. 32768 are 70 requests of 32 "
        "sentences.",
    ),
]
DimensionsOption: TypeAlias = Annotated[
    list[int] | None,
    typer.Option(
        help="A shorter vector that requests may choose, such as 128 of 384; may be repeated. Only for encoders that "
        "were tuned for it (Matryoshka). By default, those that the bundle records, and no others."
    ),
]
InstancesOption: TypeAlias = Annotated[
    int,
    typer.Option(
        min=1,
        help="Processes that run the model, each on its share of the cores. On 2 cores, two serve up to 20 % more "
        "single-text requests of 32 callers, but use twice the memory and take 1.4 times as long for a lone request.",
    ),
]
LinkOption: TypeAlias = Annotated[
    bool, typer.Option("--link", help="Share the bundle's files by hard links where the file system allows it.")
]

# How it was made and proven.
PoolingOption: TypeAlias = Annotated[
    Pooling | None, typer.Option(help="Required for an encoder that does not record its pooling.")
]
RevisionOption: TypeAlias = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")]
ProofTextsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--parity-texts",
        help="Prove on these texts, one a line. Default: over 500 built-in ones of 2 to 20,000 tokens.",
    ),
]
ProofSetsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--sts",
        help="Scored pairs, such as --sts stsb-test.tsv: an artifact may lose at most 0.5 points of Spearman on each.",
    ),
]
