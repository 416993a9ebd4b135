"""A client for threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mirror_runtime.client.exchange import BATCH_TOKENS, PROBE, CallOptions, Exchange, Request, Served, as_list
from mirror_runtime.client.grpc_transport import GrpcTransport
from mirror_runtime.client.http_transport import HttpTransport
from mirror_runtime.client.protocol import (
    MODEL_NAME,
    ClientOptions,
    ModelFacts,
    Reply,
    read_facts,
    read_fingerprint,
)
from mirror_runtime.errors import MirrorError, OverloadedError, ServerError
from mirror_runtime.vectors import Vectors


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A model's counters since the server started, its warm-up included: compute differences.

    Attributes:
        inferences: texts answered.
        executions: batches in which they were answered.
    """

    inferences: int
    executions: int


class Client:
    """Encodes texts on a Triton server that serves the model `embed`. For one thread; a context manager.

    A request that the server refuses for now (overloaded, restarting, being replaced) is repeated after growing random
    pauses until it has taken `timeout_s`. No other error is retried. A server that has never answered is not waited
    for: the first call fails immediately.

    Args:
        url: host and port; None means port 8001 of this machine for gRPC and 8000 for HTTP.
        protocol: "grpc" or "http".
        model: the model's name.
        timeout_s: how long one request may take, in seconds; retries and pauses count.
        in_flight: most requests under way at once.
        batch_tokens: most tokens in a request, estimated from the texts' lengths; a single text may have more.
        fingerprint: of the vector space that the caller expects, such as the one of an index. Another one is an error.
            None accepts any.

    Raises:
        InputError: an option is invalid.
        MissingExtra: tritonclient is not installed.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        protocol: str = "grpc",
        model: str = MODEL_NAME,
        timeout_s: float = 60.0,
        in_flight: int = 4,
        batch_tokens: int = BATCH_TOKENS,
        fingerprint: str | None = None,
    ) -> None:
        self._options = ClientOptions(
            url=url,
            protocol=protocol,
            model=model,
            timeout_s=timeout_s,
            in_flight=in_flight,
            batch_tokens=batch_tokens,
            fingerprint=fingerprint,
        )
        self._transport = connect(self._options)
        self._facts: ModelFacts | None = None

    def encode(
        self,
        texts: Iterable[str],
        batch_size: int = 32,
        *,
        deadline_s: float | None = None,
        truncate: bool | None = None,
        dimensions: int | None = None,
        prompt: str | None = None,
        query: str | None = None,
        speed: str | None = None,
    ) -> Vectors:
        """Encode texts. See `encode_detailed` for the arguments and the other exceptions.

        Returns:
            [n, width] of the model's vector type, mostly float32 [n, dim].

        Raises:
            TextError: for the first text that cannot be encoded.
        """
        return self.encode_detailed(
            texts,
            batch_size,
            deadline_s=deadline_s,
            truncate=truncate,
            dimensions=dimensions,
            prompt=prompt,
            query=query,
            speed=speed,
        ).vectors_or_raise()

    def encode_detailed(
        self,
        texts: Iterable[object],
        batch_size: int = 32,
        *,
        deadline_s: float | None = None,
        truncate: bool | None = None,
        dimensions: int | None = None,
        prompt: str | None = None,
        query: str | None = None,
        speed: str | None = None,
    ) -> Served:
        """Encode texts; return vectors, token counts, and an error for each text that has no vector.

        All vectors come from one model: texts answered before it was replaced are sent again.

        Args:
            texts: any iterable; its order is kept. An item that is not a text gets an error of its own.
            batch_size: maximum number of texts per request.
            deadline_s: seconds for the whole call; None limits each request alone.
            truncate: cut texts over the encoder's limit, or reject them; None leaves it to the server.
            dimensions: leading components to keep, one of those that the server allows; None keeps all.
            prompt: text to put in front of every text, such as "query: "; None for none.
            query: what a reranker scores the texts against; its vectors are raw scores, [n, 1].
            speed: "fast" for the static twin of a two-speed bundle, whose fingerprint the reply has.

        Raises:
            InputError: `texts` is a single string, `batch_size` is more than the server takes, or it rejects an option.
            OverloadedError: the server had too much to do for the whole time.
            UnavailableError: the server cannot be reached, or did not come back in time.
            DeadlineExceededError: a request or the whole call took too long.
            ServerError: the server failed, or serves another model than `fingerprint`.
        """
        items = as_list(texts)
        if self._facts is None:
            self._facts = read_facts(self._transport.config())
        exchange = Exchange(
            items,
            CallOptions(
                batch_size=batch_size,
                deadline_s=deadline_s,
                truncate=truncate,
                dimensions=dimensions,
                prompt=prompt,
                query=query,
                speed=speed,
            ),
            self._options,
            self._facts,
            body_bytes=self._transport.body_bytes,
        )
        while exchange.next_round():
            self._send_all(exchange)
        return exchange.result()

    def probe(self) -> None:
        """Run a real inference: health endpoints stay green while a model is dead.

        Raises:
            OverloadedError: the model refused, which only a living one does.
            ServerError: the server cannot be reached, or failed.
        """
        self._transport.submit(PROBE.tensor(), {}, self._options.timeout_s)()

    def ready(self) -> bool:
        """Return whether a real inference succeeds: health endpoints stay green while a model is dead."""
        try:
            self.probe()
        except (OverloadedError, ServerError):
            return False
        return True

    def fingerprint(self) -> str:
        """Fetch the fingerprint of the model's vector space, to compare with the one of an index.

        Raises:
            ServerError: the server cannot be reached, or its model has no fingerprint.
        """
        return read_fingerprint(self._transport.config())

    def statistics(self) -> Statistics:
        """Fetch the model's counters. With fewer executions than inferences, requests shared executions.

        Triton counts a request shortly after it has answered it.
        """
        counters = self._transport.statistics()
        # The JSON of gRPC leaves out counters that are zero.
        return Statistics(
            inferences=int(counters.get("inference_count", 0)), executions=int(counters.get("execution_count", 0))
        )

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_all(self, exchange: Exchange) -> None:
        """Send a round's requests, with up to `in_flight` under way; wait for the oldest first."""
        sent: deque[tuple[Request, Callable[[], Reply]]] = deque()
        while True:
            while len(sent) < self._options.in_flight and (request := exchange.next_request()):
                if request.pause_s:
                    time.sleep(request.pause_s)
                wait = self._transport.submit(request.tensor(), exchange.parameters, exchange.remaining_s())
                sent.append((request, wait))
            if not sent:
                return
            request, wait = sent.popleft()
            try:
                exchange.succeeded(request, wait())
            except MirrorError as error:
                exchange.failed(request, error)


def connect(options: ClientOptions) -> GrpcTransport | HttpTransport:
    """Open connections over the protocol of the options."""
    if options.protocol == "grpc":
        return GrpcTransport(options.address, options.model, options.timeout_s)
    return HttpTransport(options.address, options.model, options.timeout_s, options.in_flight)
