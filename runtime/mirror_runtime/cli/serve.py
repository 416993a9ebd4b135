"""The command `mirror serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mirror_runtime.cli.options import (
    DimensionsOption,
    EngineOption,
    InstancesOption,
    InvariantOption,
    LongTextsOption,
    MaxBatchSizeOption,
    MaxTokensInFlightOption,
    PrecisionOption,
    StreamsOption,
    port_option,
)
from mirror_runtime.cli.run import timestamped_lines
from mirror_runtime.client.protocol import MODEL_NAME
from mirror_runtime.hub import local_bundle
from mirror_runtime.selection import AUTO
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
            callback=local_bundle,
            show_default=False,
        ),
    ],
    http_port: Annotated[int, port_option("HTTP")] = 8000,
    grpc_port: Annotated[int, port_option("gRPC")] = 8001,
    metrics_port: Annotated[int, port_option("Prometheus")] = 8002,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. The server has no authentication: 0.0.0.0 serves anyone who reaches it."
        ),
    ] = "127.0.0.1",
    engine: EngineOption = AUTO,
    precision: PrecisionOption = AUTO,
    streams: StreamsOption = None,
    long_texts: LongTextsOption = LongTexts.TRUNCATE,
    instances: InstancesOption = 1,
    max_batch_size: MaxBatchSizeOption = 256,
    max_tokens_in_flight: MaxTokensInFlightOption = 32768,
    dimensions: DimensionsOption = None,
    invariant: InvariantOption = False,
    max_restarts: Annotated[
        int,
        typer.Option(min=0, help="Maximum restarts of a broken server within 10 minutes before the command gives up."),
    ] = 5,
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="Maximum time for accepted requests to finish at the end. Allow a service manager 10 s more."
        ),
    ] = 30.0,
) -> None:
    """Serve with a local tritonserver until Ctrl-C or SIGTERM, then answer accepted requests and end with status 0.

    SIGHUP and SIGQUIT do the same.

    A real inference a second watches the server: when it dies, hangs or fails every request, it is restarted. Exit
    status 2 when it could not be started, or broke too often.
    """
    console = Console(highlight=False, soft_wrap=True)

    def print_endpoints(server: Server) -> None:
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
            dimensions=tuple(dimensions or ()),
            invariant=invariant,
        ),
        service=ServiceOptions(max_restarts=max_restarts, drain_s=drain_seconds),
        on_ready=print_endpoints,
        on_progress=timestamped_lines(Console(stderr=True, highlight=False, soft_wrap=True)),
    )
    console.print("stopped")
