"""The command `mirror serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mirror_runtime.tokens import LongTexts
from mirror_runtime.triton.repository import MODEL_NAME
from mirror_runtime.triton.server import Server
from mirror_runtime.triton.server import serve as serve_bundle


def serve(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE")],
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus port; 0 picks a free one.")] = 8002,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. There is no authentication: 0.0.0.0 serves whoever reaches it."),
    ] = "127.0.0.1",
    engine: Annotated[str, typer.Option(help="auto, or an engine that the bundle holds, such as openvino.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, or a precision that the bundle holds, such as bf16.")] = "auto",
    streams: Annotated[
        int | None,
        typer.Option(min=1, help="Executions side by side: 2 on 2 cores favours throughput, 1 favours one request."),
    ] = None,
    long_texts: Annotated[
        LongTexts, typer.Option(help="Texts over the encoder's max_tokens: cut, refused, or averaged over chunks.")
    ] = LongTexts.TRUNCATE,
    max_batch_size: Annotated[
        int, typer.Option(min=1, help="Most texts an execution: with 256, eight requests of 32 texts share one.")
    ] = 256,
) -> None:
    """Serve a bundle with a local tritonserver until Ctrl-C."""
    console = Console(highlight=False, soft_wrap=True)

    def report(server: Server) -> None:
        console.print(f"serving {bundle} as model {MODEL_NAME}; Ctrl-C stops it")
        console.print(f"gRPC     {server.host}:{server.grpc_port}")
        console.print(f"HTTP     http://{server.host}:{server.http_port}/v2/models/{MODEL_NAME}")
        console.print(f"metrics  http://{server.host}:{server.metrics_port}/metrics")

    serve_bundle(
        bundle,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        host=host,
        engine=engine,
        precision=precision,
        streams=streams,
        long_texts=long_texts,
        max_batch_size=max_batch_size,
        on_ready=report,
    )
    console.print("stopped")
