"""The command `mirror gateway`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mirror_runtime.cli.options import EngineOption, LongTextsOption, PrecisionOption, StreamsOption, port_option
from mirror_runtime.cli.run import truncations_counted_elsewhere
from mirror_runtime.client.protocol import MODEL_NAME, ClientOptions
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.selection import AUTO
from mirror_runtime.tokenizer import LongTexts


def gateway(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle to run in this process.", metavar="[BUNDLE]", show_default=False)
    ] = None,
    triton: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Instead of a bundle: a Triton server's port.")
    ] = None,
    triton_protocol: Annotated[str, typer.Option(help="The protocol on that port: grpc or http.")] = "grpc",
    triton_model: Annotated[str, typer.Option(help="The model's name on that server.")] = MODEL_NAME,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for that server to come up.")
    ] = 60.0,
    port: Annotated[int, port_option("HTTP")] = 8080,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. 0.0.0.0 serves anyone who reaches it and has a key, if keys are set."),
    ] = "127.0.0.1",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, one a line; each of them opens /v1, /embed and /info. Or set one key in the "
            "environment variable MIRROR_API_KEY."
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(help="The model's name in requests. Default: the name of the encoder's base model."),
    ] = None,
    dimensions: Annotated[
        list[int] | None,
        typer.Option(
            help="A shorter vector that requests may choose, such as 128 of 384; may be repeated. Only for encoders "
            "that were tuned for it (Matryoshka). By default, requests for fewer dimensions are refused."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum texts per request.")] = 2048,
    max_in_flight: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum texts accepted and not yet answered; further requests get 429. At 1,000 texts a second, 4096 "
            "make a request wait 4 s at worst.",
        ),
    ] = 4096,
    max_body: Annotated[int, typer.Option(min=1, metavar="BYTES", help="Largest request body.")] = 4_000_000,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="After this time, an unanswered request gets 503.")
    ] = 30.0,
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="After SIGTERM, how long new connections are still accepted while /health already answers 503.",
        ),
    ] = 1.0,
    engine: EngineOption = AUTO,
    precision: PrecisionOption = AUTO,
    streams: StreamsOption = None,
    long_texts: LongTextsOption = LongTexts.TRUNCATE,
) -> None:
    """Serve embeddings over HTTP as OpenAI's API and Text Embeddings Inference do, until Ctrl-C or SIGTERM.

    Routes: POST /v1/embeddings, POST /embed, GET /v1/models, /info, /health, /metrics, /docs. When it is stopped, it
    answers the requests under way and ends with status 0.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client", "orjson"):
        require(package, "gateway")
    from mirror_runtime.gateway.backends import EncodingBackend, InProcessBackend, TritonBackend, fetch_card
    from mirror_runtime.gateway.server import listen, run
    from mirror_runtime.gateway.settings import GatewaySettings, read_keys

    if (bundle is None) == (triton is None):
        raise InputError("pass either a bundle or --triton HOST:PORT")
    keys = read_keys(api_key_file)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    backend: EncodingBackend
    # Truncations are counted in a header and in the metrics.
    with listen(host, port) as listener, truncations_counted_elsewhere():
        if bundle is not None:
            encoder = Encoder.load(bundle, engine=engine, precision=precision, streams=streams, long_texts=long_texts)
            encoder.warm_up()
            # The gateway's own limit comes first; only probes of /health may exceed it.
            backend = InProcessBackend(encoder, long_texts=long_texts.value, max_waiting=max_in_flight + 1)
        else:
            options = ClientOptions(url=triton, protocol=triton_protocol, model=triton_model, timeout_s=timeout)
            backend = TritonBackend(options, fetch_card(options, wait_s=wait))
        settings = GatewaySettings(
            model=model_name or backend.card.model,
            dimensions=tuple(sorted(set(dimensions or ()))),
            keys=keys,
            max_batch=max_batch,
            max_in_flight=max_in_flight,
            max_body_bytes=max_body,
            timeout_s=timeout,
            drain_s=drain,
        )
        console = Console(highlight=False, soft_wrap=True)
        run(backend, settings, listener, on_progress=lambda line: console.print(line, markup=False))
