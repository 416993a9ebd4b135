"""The command `mirror serve`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mirror_runtime.cli.options import EngineOption, LongTextsOption, PrecisionOption, StreamsOption
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.server.server import Server
from mirror_runtime.triton.server.supervisor import ServiceOptions
from mirror_runtime.triton.server.supervisor import serve as serve_source


def serve(
    source: Annotated[
        Path,
        typer.Argument(
            help="A bundle's folder, or a model repository that export/to_triton.py or mirror deploy wrote.",
            metavar="BUNDLE|REPO",
            show_default=False,
        ),
    ],
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus port; 0 picks a free one.")] = 8002,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. There is no authentication: 0.0.0.0 serves whoever reaches it."),
    ] = "127.0.0.1",
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    streams: StreamsOption = None,
    long_texts: LongTextsOption = LongTexts.TRUNCATE,
    instances: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that run the model, each on its share of the cores: 2 on 2 cores answer up to 20 % more "
            "single texts of 32 callers, hold twice the memory, and take 1.4 times as long for a lone one.",
        ),
    ] = 1,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Most texts a request may have.")] = 256,
    max_tokens_in_flight: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens taken and not answered; more are refused. 32768: 70 requests of 32 sentences."
        ),
    ] = 32768,
    max_restarts: Annotated[
        int,
        typer.Option(min=0, help="How often within 10 minutes a broken server is started again before giving up."),
    ] = 5,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="At the end, how long accepted requests may take. Give a supervisor 10 s more."),
    ] = 30.0,
) -> None:
    """Serve with a local tritonserver until Ctrl-C or SIGTERM, then answer what was accepted, and end with status 0.

    A real inference a second watches it: what died, hangs or fails every request is started again. Exit status 2 when
    it could not be started, or broke too often.
    """
    console = Console(highlight=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def report(server: Server) -> None:
        console.print(f"serving {source} as model {MODEL_NAME}; Ctrl-C stops it", markup=False)
        console.print(f"gRPC     {server.host}:{server.grpc_port}")
        console.print(f"HTTP     http://{server.host}:{server.http_port}/v2/models/{MODEL_NAME}")
        console.print(f"metrics  http://{server.host}:{server.metrics_port}/metrics")

    serve_source(
        source,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        host=host,
        options=ServingOptions(
            engine=engine,
            precision=precision,
            streams=streams,
            long_texts=long_texts,
            instances=instances,
            max_batch_size=max_batch_size,
            max_tokens_in_flight=max_tokens_in_flight,
        ),
        service=ServiceOptions(max_restarts=max_restarts, drain_s=drain_seconds),
        on_ready=report,
        say=lambda line: errors.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False),
    )
    console.print("stopped")
