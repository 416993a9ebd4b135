"""What a call of a client asks for, and what a server says of its model. What both clients share."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mirror_runtime.client.chunks import Chunk
from mirror_runtime.client.protocol import DATA_TYPES, Parameters
from mirror_runtime.errors import DeadlineExceededError, InputError, ServerError
from mirror_runtime.vectors import Vectors, dtype_of_type

BATCH_TOKENS = 8192
"""Tokens a request, as estimated: 32 texts of 256. Of longer texts there are fewer, so that no request takes long."""

_NUMBERS = {name: kind for kind, name in DATA_TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a client asks of the server once.

    Attributes:
        width: of a vector, as an array's second dimension.
        dtype: of its numbers.
        max_batch_size: texts a request, at most.
    """

    width: int
    dtype: np.dtype[Any]
    max_batch_size: int

    def empty(self, dimensions: int | None) -> Vectors:
        """Give the vectors of no texts, [0, width]."""
        bits = 8 if self.dtype == np.uint8 else 1
        return np.zeros((0, self.width if dimensions is None else dimensions // bits), self.dtype)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of `encode`: what its requests carry, and when it ends."""

    parameters: Parameters
    timeout_s: float
    ends_at: float

    @classmethod
    def begin(
        cls,
        timeout_s: float,
        deadline_s: float | None,
        *,
        truncate: bool | None,
        dimensions: int | None,
        prompt: str | None,
    ) -> Call:
        """Start the clock of a call; what is None is left to the server."""
        given: dict[str, str | int | bool | None] = {"truncate": truncate, "dimensions": dimensions, "prompt": prompt}
        return cls(
            parameters={name: value for name, value in given.items() if value is not None},
            timeout_s=timeout_s,
            ends_at=math.inf if deadline_s is None else time.monotonic() + deadline_s,
        )

    def gives_up_at(self) -> float:
        """Give the time, of the monotonic clock, until which a request that begins now may be tried."""
        return min(self.ends_at, time.monotonic() + self.timeout_s)

    def patience(self) -> float:
        """Give the seconds that a request which begins now may take."""
        left = min(self.timeout_s, self.ends_at - time.monotonic())
        if left <= 0:
            raise DeadlineExceededError("the time given to encode is over; not all of the texts have been answered")
        return left


PROBE = Chunk(positions=(0,), texts=(b"ready?",))
"""A request that every encoder can answer."""


def check_options(url: str | None, protocol: str, timeout_s: float, in_flight: int, batch_tokens: int) -> str:
    """See that a client's options make sense, and give the address.

    Raises:
        InputError: one of them does not.
    """
    if protocol not in ("grpc", "http"):
        raise InputError(f"protocol is {protocol!r}: it is 'grpc' or 'http'")
    if url is not None and "://" in url:
        raise InputError(f"url is {url!r}: give host:port without a scheme")
    if in_flight < 1:
        raise InputError(f"in_flight is {in_flight}: it must be at least 1")
    if timeout_s <= 0 or batch_tokens < 1:
        raise InputError(f"timeout_s is {timeout_s} and batch_tokens {batch_tokens}: they must be positive")
    return url or {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}[protocol]


def check_batch_size(batch_size: int, facts: ModelFacts) -> None:
    """See that the server takes requests of so many texts.

    Raises:
        InputError: it does not.
    """
    if not 1 <= batch_size <= facts.max_batch_size:
        raise InputError(f"batch_size is {batch_size}: this server takes 1 to {facts.max_batch_size} texts a request")


def read_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Read a model's configuration.

    Raises:
        ServerError: it is none of our models.
    """
    outputs = {output["name"]: output for output in config.get("output", [])}
    embedding = outputs.get("EMBEDDING", {})
    if embedding.get("data_type") not in _NUMBERS:
        raise ServerError(f"model {config.get('name')!r} has no output EMBEDDING of vectors: it is none of ours")
    return ModelFacts(
        width=int(embedding["dims"][0]),
        dtype=dtype_of_type(_NUMBERS[embedding["data_type"]]),
        max_batch_size=int(config["max_batch_size"]),
    )


def read_fingerprint(config: Mapping[str, Any]) -> str:
    """Read the name of the vector space from a model's configuration.

    Raises:
        ServerError: it is not there.
    """
    said = config.get("parameters", {}).get("fingerprint")
    if said is None:
        raise ServerError(f"model {config.get('name')!r} names no fingerprint: it is none of ours, or an old one")
    return str(said["string_value"])
