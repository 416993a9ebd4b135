"""The command `mirror gateway`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mirror_runtime.cli.options import (
    EngineOption,
    InvariantOption,
    LongTextsOption,
    PrecisionOption,
    StreamsOption,
    port_option,
)
from mirror_runtime.cli.run import truncations_counted_elsewhere
from mirror_runtime.client.protocol import MODEL_NAME, ClientOptions
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require
from mirror_runtime.gateway.settings import GatewaySettings, hosts_allowed_at, read_keys
from mirror_runtime.selection import AUTO
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.twins import Speed
from mirror_runtime.vector_cache import VectorCache

LIMITS = GatewaySettings(model="any")
"""The default limits."""


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
        str | None, typer.Option(help="The model's name in requests. Default: the name of the encoder's base model.")
    ] = None,
    dimensions: Annotated[
        list[int] | None,
        typer.Option(
            help="A shorter vector that requests may choose, such as 128 of 384; may be repeated. Only for encoders "
            "that were tuned for it (Matryoshka). By default, those that the model records, and no others."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum texts per request.")] = LIMITS.max_batch,
    max_in_flight: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum texts accepted and not yet answered, of small requests and of larger ones each; further "
            "requests get 429. At 1,000 texts a second, 4096 make a large request wait 4 s at worst.",
        ),
    ] = LIMITS.max_in_flight,
    max_body: Annotated[
        int, typer.Option(min=1, metavar="BYTES", help="Largest request body.")
    ] = LIMITS.max_body_bytes,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="After this time, an unanswered request gets 503.")
    ] = LIMITS.timeout_s,
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="After SIGTERM, how long new connections are still accepted while /health already answers 503.",
        ),
    ] = LIMITS.drain_s,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name that requests may call this gateway by in their Host header; may be repeated; * for any. "
            "Default on loopback: localhost, 127.0.0.1 and [::1]; elsewhere any.",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Origin of a web page whose scripts may call this gateway: https://example.org."
        ),
    ] = None,
    max_connections: Annotated[
        int,
        typer.Option(min=1, help="Open connections. Beyond it, the one that waits longest for its client is closed."),
    ] = LIMITS.max_connections,
    max_peer_connections: Annotated[
        int, typer.Option(min=1, help="Likewise, of one address.")
    ] = LIMITS.max_peer_connections,
    max_header: Annotated[
        int, typer.Option(min=1, metavar="BYTES", help="Largest head of a request, its headers included.")
    ] = LIMITS.max_header_bytes,
    max_headers: Annotated[int, typer.Option(min=1, help="Headers of a request.")] = LIMITS.max_headers,
    max_buffered: Annotated[
        int,
        typer.Option(
            min=1, metavar="BYTES", help="Of bodies that were read and answers that were not yet sent, together."
        ),
    ] = LIMITS.max_buffered_bytes,
    header_timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="In which a request's head must arrive.")
    ] = LIMITS.header_s,
    body_timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="In which its body must arrive.")
    ] = LIMITS.body_s,
    answer_timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="In which its answer must be read.")
    ] = LIMITS.answer_s,
    keep_alive: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="After which an unused connection is closed.")
    ] = LIMITS.idle_s,
    engine: EngineOption = AUTO,
    precision: PrecisionOption = AUTO,
    streams: StreamsOption = None,
    long_texts: LongTextsOption = LongTexts.TRUNCATE,
    invariant: InvariantOption = False,
    vector_cache: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="BYTES",
            help="Keep the vectors of texts asked for last, in so much memory: 1000000000 holds half a million of 384 "
            "components. Default: none.",
        ),
    ] = None,
) -> None:
    """Serve embeddings over HTTP as OpenAI's API and Text Embeddings Inference do, until Ctrl-C or SIGTERM.

    Routes: POST /v1/embeddings, POST /embed, GET /v1/models, /info, /health, /metrics, /docs. When it is stopped, it
    answers the requests under way and ends with status 0.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client", "orjson"):
        require(package, "gateway")
    from mirror_runtime.gateway.backends import EncodingBackend, TritonBackend, backends_of, fetch_card
    from mirror_runtime.gateway.server import listen, run

    if (bundle is None) == (triton is None):
        raise InputError("pass either a bundle or --triton HOST:PORT")
    if invariant and triton is not None:
        raise InputError("--invariant belongs to the model: pass it to mirror serve, which runs it")
    if vector_cache is not None and triton is not None:
        raise InputError("--vector-cache needs the bundle in this process, and not --triton")
    keys = read_keys(api_key_file)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    backend: EncodingBackend
    twins: Sequence[EncodingBackend] = ()
    # Truncations are counted in a header and in the metrics.
    with listen(host, port) as listener, truncations_counted_elsewhere():
        if bundle is not None:
            encoder = Encoder.load(
                bundle, engine=engine, precision=precision, streams=streams, long_texts=long_texts, invariant=invariant,
                vector_cache=None if vector_cache is None else VectorCache(vector_cache),
            )  # fmt: skip
            encoder.warm_up()
            if encoder.has_twin:
                encoder.at(Speed.FAST).warm_up()
            # The gateway's own limits come first: its lanes admit less than twice as many texts each.
            backend, *twins = backends_of(encoder, long_texts=long_texts.value, max_waiting=4 * max_in_flight + 1)
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
            allowed_hosts=hosts_allowed_at(host, allowed_host or ()),
            cors=tuple(cors or ()),
            max_connections=max_connections,
            max_peer_connections=max_peer_connections,
            max_header_bytes=max_header,
            max_headers=max_headers,
            max_buffered_bytes=max_buffered,
            header_s=header_timeout,
            body_s=body_timeout,
            answer_s=answer_timeout,
            idle_s=keep_alive,
        )
        console = Console(highlight=False, soft_wrap=True)
        run(backend, settings, listener, on_progress=lambda line: console.print(line, markup=False), twins=twins)
