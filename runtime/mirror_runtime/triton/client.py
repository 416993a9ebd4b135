"""Vectors from a running Triton server."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.encoder import Encoded
from mirror_runtime.errors import InputError, ServerError, TextError
from mirror_runtime.tokens import defect
from mirror_runtime.triton.grpc_transport import GrpcTransport
from mirror_runtime.triton.http_transport import HttpTransport
from mirror_runtime.triton.repository import DATA_TYPES, MODEL_NAME
from mirror_runtime.triton.transport import Rejected, Reply, Transport
from mirror_runtime.vectors import Vectors, dtype_of_type

_NUMBERS = {name: kind for kind, name in DATA_TYPES.items()}

_OWN_POSITION = re.compile(r"^.*?text \d+: ", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A model's counters since the server started, its warm-up included: take differences.

    Attributes:
        inferences: texts answered.
        executions: batches that they were answered in.
    """

    inferences: int
    executions: int


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The texts of one request: their positions in what the caller passed, and their UTF-8."""

    positions: tuple[int, ...]
    texts: tuple[bytes, ...]

    def tensor(self) -> NDArray[Any]:
        return np.array(self.texts, dtype=np.object_).reshape(-1, 1)

    def halves(self) -> tuple[_Chunk, _Chunk]:
        cut = len(self.texts) // 2
        return (
            _Chunk(positions=self.positions[:cut], texts=self.texts[:cut]),
            _Chunk(positions=self.positions[cut:], texts=self.texts[cut:]),
        )


class Client:
    """Encodes texts on a Triton server that serves the model `embed`. For one thread; a context manager.

    Args:
        url: host and port; None means this machine's 8001 for gRPC and 8000 for HTTP.
        protocol: "grpc" or "http".
        model: the model's name.
        timeout_s: how long one request may take, in seconds.
        in_flight: how many requests are under way at once.

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
    ) -> None:
        if protocol not in ("grpc", "http"):
            raise InputError(f"protocol is {protocol!r}: it is 'grpc' or 'http'")
        if url is not None and "://" in url:
            raise InputError(f"url is {url!r}: give host:port without a scheme")
        if in_flight < 1:
            raise InputError(f"in_flight is {in_flight}: it must be at least 1")
        self._transport: Transport
        if protocol == "grpc":
            self._transport = GrpcTransport(url or "127.0.0.1:8001", model, timeout_s)
        else:
            self._transport = HttpTransport(url or "127.0.0.1:8000", model, timeout_s, in_flight)
        self._in_flight = in_flight
        self._limits: tuple[int, np.dtype[Any], int] | None = None

    def encode(self, texts: Iterable[str], batch_size: int = 32) -> Vectors:
        """Give the vectors of texts.

        Args:
            texts: any iterable; its order is kept.
            batch_size: texts a request.

        Returns:
            [n, width] of the model's vector type, mostly float32 [n, dim].

        Raises:
            TextError: for the first text that cannot be encoded.
            ServerError: the server cannot be reached or failed.
        """
        encoded = self.encode_detailed(texts, batch_size)
        if encoded.errors:
            raise encoded.errors[min(encoded.errors)]
        return encoded.vectors

    def encode_detailed(self, texts: Iterable[object], batch_size: int = 32) -> Encoded:
        """Give the vectors of texts, their token counts, and what was wrong with those that have no vector.

        Args:
            texts: any iterable; its order is kept. What is not a text gets an error of its own.
            batch_size: texts a request.

        Raises:
            InputError: `texts` is one string, or `batch_size` is more than the server takes.
            ServerError: the server cannot be reached or failed.
        """
        if isinstance(texts, (str, bytes)):
            raise InputError(f"texts is one {type(texts).__name__}: pass a list, such as [text]")
        width, dtype, largest = self._model_limits()
        if not 1 <= batch_size <= largest:
            raise InputError(f"batch_size is {batch_size}: this server takes 1 to {largest} texts a request")
        items = list(texts)
        errors: dict[int, TextError] = {}
        replies = list(self._replies(self._chunks(items, batch_size, errors), errors))
        vectors = np.zeros((len(items), width), dtype)
        tokens = np.zeros(len(items), dtype=np.int64)
        truncated = np.zeros(len(items), dtype=np.bool_)
        for chunk, reply in replies:
            positions = list(chunk.positions)
            vectors[positions] = reply.vectors
            tokens[positions] = reply.tokens[:, 0]
            truncated[positions] = reply.truncated[:, 0]
        return Encoded(vectors=vectors, tokens=tokens, truncated=truncated, errors=errors)

    def ready(self) -> bool:
        """Say whether a real inference succeeds: health endpoints stay green while a model is dead."""
        try:
            self._transport.submit(np.array([[b"ready?"]], dtype=np.object_))()
        except ServerError:
            return False
        return True

    def fingerprint(self) -> str:
        """Fetch the name of the model's vector space: compare it with the one that an index was made with.

        Raises:
            ServerError: the server cannot be reached, or its model does not say.
        """
        config = self._transport.config()
        said = config.get("parameters", {}).get("fingerprint")
        if said is None:
            raise ServerError(f"model {config.get('name')!r} names no fingerprint: it is none of ours, or an old one")
        return str(said["string_value"])

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

    def _model_limits(self) -> tuple[int, np.dtype[Any], int]:
        """Give the vectors' width and type and the most texts a request, asked of the server once."""
        if self._limits is None:
            config = self._transport.config()
            outputs = {output["name"]: output for output in config.get("output", [])}
            embedding = outputs.get("EMBEDDING", {})
            if embedding.get("data_type") not in _NUMBERS:
                raise ServerError(
                    f"model {config.get('name')!r} has no output EMBEDDING of vectors: it is none of ours"
                )
            kind = dtype_of_type(_NUMBERS[embedding["data_type"]])
            self._limits = (int(embedding["dims"][0]), kind, int(config["max_batch_size"]))
        return self._limits

    def _chunks(self, texts: Iterable[object], batch_size: int, errors: dict[int, TextError]) -> Iterator[_Chunk]:
        """Group texts into requests of at most `batch_size` texts and the transport's bytes."""
        positions: list[int] = []
        held: list[bytes] = []
        size = 0
        limit = self._transport.body_bytes
        for position, text in enumerate(texts):
            raw = _utf8(position, text, limit)
            if isinstance(raw, TextError):
                errors[position] = raw
                continue
            if held and (len(held) == batch_size or size + len(raw) > limit):
                yield _Chunk(positions=tuple(positions), texts=tuple(held))
                positions, held, size = [], [], 0
            positions.append(position)
            held.append(raw)
            size += len(raw) + 4
        if held:
            yield _Chunk(positions=tuple(positions), texts=tuple(held))

    def _replies(self, chunks: Iterable[_Chunk], errors: dict[int, TextError]) -> Iterator[tuple[_Chunk, Reply]]:
        """Send chunks with several under way, and give each reply with the chunk it answers."""
        pending: deque[tuple[_Chunk, Callable[[], Reply]]] = deque()
        for chunk in chunks:
            pending.append((chunk, self._transport.submit(chunk.tensor())))
            if len(pending) == self._in_flight:
                yield from self._settle(*pending.popleft(), errors)
        while pending:
            yield from self._settle(*pending.popleft(), errors)

    def _settle(
        self, chunk: _Chunk, wait: Callable[[], Reply], errors: dict[int, TextError]
    ) -> Iterator[tuple[_Chunk, Reply]]:
        """Wait for a reply; halve a refused request until the texts that are at fault stand alone."""
        try:
            yield chunk, wait()
        except Rejected as error:
            if len(chunk.texts) == 1:
                position = chunk.positions[0]
                errors[position] = TextError(position, _OWN_POSITION.sub("", error.reason))
                return
            for half in chunk.halves():
                yield from self._settle(half, self._transport.submit(half.tensor()), errors)


def _utf8(position: int, text: object, limit: int) -> bytes | TextError:
    wrong = defect(position, text)
    if wrong is not None:
        return wrong
    raw = str(text).encode("utf-8")
    if len(raw) > limit:
        return TextError(position, f"is {len(raw)} bytes of UTF-8; one request carries {limit}: shorten it")
    return raw
