"""Options that `mirror serve` and `mirror gateway` share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from mirror_runtime.tokenizer import LongTexts

EngineOption: TypeAlias = Annotated[
    str, typer.Option(help="auto, or an engine that the bundle holds, such as openvino.")
]
PrecisionOption: TypeAlias = Annotated[
    str, typer.Option(help="auto, or a precision that the bundle holds, such as bf16.")
]
StreamsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, help="Executions side by side: 2 on 2 cores favours throughput, 1 favours one request."),
]
LongTextsOption: TypeAlias = Annotated[
    LongTexts, typer.Option(help="Texts over the encoder's max_tokens: cut, refused, or averaged over chunks.")
]
