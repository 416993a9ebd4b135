"""Vectors from a running Triton server."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from mirror_runtime.client.calls import (
    BATCH_TOKENS,
    PROBE,
    Call,
    ModelFacts,
    check_batch_size,
    check_options,
    read_facts,
    read_fingerprint,
)
from mirror_runtime.client.chunks import (
    REPLACEMENTS,
    Chunk,
    Limits,
    Served,
    assembled,
    check_fingerprint,
    chunked,
    current,
    listed,
    outdated,
)
from mirror_runtime.client.grpc_transport import GrpcTransport
from mirror_runtime.client.http_transport import HttpTransport
from mirror_runtime.client.protocol import MODEL_NAME, Rejected, Reply, Transport
from mirror_runtime.client.retry import Backoff
from mirror_runtime.errors import OverloadedError, ServerError, TextError, UnavailableError
from mirror_runtime.vectors import Vectors


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A model's counters since the server started, its warm-up included: take differences.

    Attributes:
        inferences: texts answered.
        executions: batches that they were answered in.
    """

    inferences: int
    executions: int


class Client:
    """Encodes texts on a Triton server that serves the model `embed`. For one thread; a context manager.

    A server that refuses for now (too much to do, starting again, being replaced) is asked again, with growing random
    pauses, until a request has taken `timeout_s`. Nothing else is tried twice. A server that has never answered is not
    waited for: the first call says at once that nobody listens.

    Args:
        url: host and port; None means this machine's 8001 for gRPC and 8000 for HTTP.
        protocol: "grpc" or "http".
        model: the model's name.
        timeout_s: how long one request may take, tries and pauses included, in seconds.
        in_flight: how many requests are under way at once.
        batch_tokens: tokens a request, estimated from the texts' lengths; one text alone may have more.
        fingerprint: of the vector space that is wanted, such as the one an index was made with. Another one is an
            error. None takes any.

    Raises:
        InputError: an option is wrong.
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
        url = check_options(url, protocol, timeout_s, in_flight, batch_tokens)
        self._transport: Transport
        if protocol == "grpc":
            self._transport = GrpcTransport(url, model, timeout_s)
        else:
            self._transport = HttpTransport(url, model, timeout_s, in_flight)
        self._timeout_s, self._in_flight, self._batch_tokens = timeout_s, in_flight, batch_tokens
        self._expected = fingerprint
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
    ) -> Vectors:
        """Give the vectors of texts. See `encode_detailed` for the arguments.

        Returns:
            [n, width] of the model's vector type, mostly float32 [n, dim].

        Raises:
            TextError: for the first text that cannot be encoded.
            InputError: see `encode_detailed`, and so are the following.
            OverloadedError: see there.
            ServerError: see there.
        """
        encoded = self.encode_detailed(
            texts, batch_size, deadline_s=deadline_s, truncate=truncate, dimensions=dimensions, prompt=prompt
        )
        if encoded.errors:
            raise encoded.errors[min(encoded.errors)]
        return encoded.vectors

    def encode_detailed(
        self,
        texts: Iterable[object],
        batch_size: int = 32,
        *,
        deadline_s: float | None = None,
        truncate: bool | None = None,
        dimensions: int | None = None,
        prompt: str | None = None,
    ) -> Served:
        """Give the vectors of texts, their token counts, and what was wrong with those that have no vector.

        All vectors are of one model: texts that were answered before it was replaced are sent again.

        Args:
            texts: any iterable; its order is kept. What is not a text gets an error of its own.
            batch_size: texts a request, at most.
            deadline_s: how long all of it may take, in seconds; None bounds each request alone.
            truncate: whether texts over the encoder's limit are cut or else refused; None leaves it to the server.
            dimensions: leading components to keep; None keeps all.
            prompt: text to put in front of every text, such as "query: "; None for none.

        Raises:
            InputError: `texts` is one string, or `batch_size` is more than the server takes.
            OverloadedError: the server had too much to do all the time.
            UnavailableError: the server cannot be reached, or did not come back in time.
            DeadlineExceededError: a request took too long, or all of them did.
            ServerError: the server failed, or serves another model than `fingerprint`.
        """
        items = listed(texts)
        facts = self._model_facts()
        check_batch_size(batch_size, facts)
        call = Call.begin(self._timeout_s, deadline_s, truncate=truncate, dimensions=dimensions, prompt=prompt)
        limits = Limits(texts=batch_size, tokens=self._batch_tokens, body_bytes=self._transport.body_bytes)
        errors: dict[int, TextError] = {}
        replies = list(self._replies(chunked(items, limits, errors), call, errors))
        for _ in range(REPLACEMENTS):
            if not outdated(replies):
                break
            again = outdated(replies)
            replies = [*current(replies), *self._replies(again, call, errors)]
        else:
            raise ServerError("the model was replaced again and again during the call: try later")
        check_fingerprint(self._expected, replies)
        return assembled(len(items), replies, errors, facts.empty(dimensions))

    def probe(self) -> None:
        """Make a real inference: health endpoints stay green while a model is dead.

        Raises:
            OverloadedError: the model refused, which only a living one does.
            ServerError: the server cannot be reached, or failed.
        """
        self._transport.submit(PROBE.tensor(), {}, self._timeout_s)()

    def ready(self) -> bool:
        """Say whether a real inference succeeds: health endpoints stay green while a model is dead."""
        try:
            self.probe()
        except (OverloadedError, ServerError):
            return False
        return True

    def fingerprint(self) -> str:
        """Fetch the name of the model's vector space: compare it with the one that an index was made with.

        Raises:
            ServerError: the server cannot be reached, or its model does not say.
        """
        return read_fingerprint(self._transport.config())

    def statistics(self) -> Statistics:
        """Fetch the model's counters. executions < inferences says that requests shared executions.

        Triton counts a request a moment after it has answered it.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _model_facts(self) -> ModelFacts:
        if self._facts is None:
            self._facts = read_facts(self._transport.config())
        return self._facts

    def _replies(
        self, chunks: Iterable[Chunk], call: Call, errors: dict[int, TextError]
    ) -> Iterator[tuple[Chunk, Reply]]:
        """Send chunks with several under way, and give each reply with the chunk it answers."""
        pending: deque[tuple[Chunk, Callable[[], Reply]]] = deque()
        for chunk in chunks:
            pending.append((chunk, self._submit(chunk, call)))
            if len(pending) == self._in_flight:
                yield from self._settle(*pending.popleft(), call, errors)
        while pending:
            yield from self._settle(*pending.popleft(), call, errors)

    def _submit(self, chunk: Chunk, call: Call) -> Callable[[], Reply]:
        return self._transport.submit(chunk.tensor(), call.parameters, call.patience())

    def _settle(
        self, chunk: Chunk, wait: Callable[[], Reply], call: Call, errors: dict[int, TextError]
    ) -> Iterator[tuple[Chunk, Reply]]:
        """Wait for a reply; halve a refused request until the texts that are at fault stand alone."""
        backoff = Backoff(call.gives_up_at())
        while True:
            try:
                yield chunk, wait()
            except (OverloadedError, UnavailableError) as refusal:
                time.sleep(backoff.pause(refusal))
                wait = self._submit(chunk, call)
                continue
            except Rejected as error:
                if len(chunk.texts) == 1:
                    errors[chunk.positions[0]] = chunk.fault(error)
                    return
                for half in chunk.halves():
                    yield from self._settle(half, self._submit(half, call), call, errors)
            return
