"""What gRPC and HTTP have in common: the model's name, tensors and data types, its configuration, and errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import VectorType
from mirror_runtime.errors import (
    DeadlineExceededError,
    InputError,
    MirrorError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from mirror_runtime.vectors import Vectors, cut, dtype_of_vector_type

MODEL_NAME = "embed"

DATA_TYPES: Mapping[VectorType, str] = MappingProxyType(
    {
        VectorType.FLOAT32: "TYPE_FP32",
        VectorType.FLOAT16: "TYPE_FP16",
        VectorType.INT8: "TYPE_INT8",
        VectorType.BINARY: "TYPE_UINT8",
    }
)
"""Triton's data type of each vector type."""

_VECTOR_TYPES = {data_type: vector_type for vector_type, data_type in DATA_TYPES.items()}

_LOCAL = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}

OUTPUTS = ("EMBEDDING", "TOKENS", "TRUNCATED", "FINGERPRINT")

PROBE_TEXT = b"ready?"
"""The text of a health check's inference, which every encoder can answer. Triton's model knows checks by it."""

Parameters: TypeAlias = Mapping[str, "str | int | bool"]
"""Parameters of one request, by name."""

DEAD_RUNNER = "is not healthy"
"""Part of Triton's message while the process that runs a model is dead or stopped."""

# Both match messages of `triton.model.scheduler`.
_EXPIRED = "was over before work on it"
_RETRY_HINT = re.compile(r"retry (?:after|in) (\d+(?:\.\d+)?) ?(ms|s)\b")


class Rejected(ServerError):
    """The server rejected a request as invalid; most of its texts may still be valid one by one."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NotServed(ServerError):
    """The server has no such model. If it had a moment ago, it is stopping and has unloaded it."""


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Options of a client, see `Client` and `AsyncClient`."""

    url: str | None = None
    protocol: str = "grpc"
    model: str = MODEL_NAME
    timeout_s: float = 60.0
    in_flight: int = 1
    batch_tokens: int = 1
    fingerprint: str | None = None
    patient: bool = True

    def __post_init__(self) -> None:
        if self.protocol not in _LOCAL:
            raise InputError(f"protocol is {self.protocol!r}: it must be 'grpc' or 'http'")
        if self.url is not None and "://" in self.url:
            raise InputError(f"url is {self.url!r}: it must be host:port without a scheme")
        if self.in_flight < 1:
            raise InputError(f"in_flight is {self.in_flight}: it must be at least 1")
        if self.timeout_s <= 0 or self.batch_tokens < 1:
            raise InputError(
                f"timeout_s is {self.timeout_s} and batch_tokens {self.batch_tokens}: they must be positive"
            )

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url or _LOCAL[self.protocol]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a client reads from the model's configuration, once."""

    width: int  # length of a vector's array
    vector_type: VectorType
    max_batch_size: int  # texts per request

    def empty(self, dimensions: int | None) -> Vectors:
        """Return the vectors of no texts, [0, width]."""
        full = np.zeros((0, self.width), dtype_of_vector_type(self.vector_type))
        return cut(full, dimensions, normalize=False)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply to one request of n texts."""

    vectors: Vectors  # [n, width] of the model's vector type
    tokens: NDArray[np.int32]  # [n, 1]
    truncated: NDArray[np.bool_]  # [n, 1]
    fingerprint: str


def read_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Read the facts from a model's configuration, or raise if this project did not make it."""
    outputs = {output["name"]: output for output in config.get("output", [])}
    embedding = outputs.get("EMBEDDING", {})
    if embedding.get("data_type") not in _VECTOR_TYPES:
        raise ServerError(
            f"model {config.get('name')!r} has no output EMBEDDING of vectors: this project did not make it"
        )
    return ModelFacts(
        width=int(embedding["dims"][0]),
        vector_type=_VECTOR_TYPES[embedding["data_type"]],
        max_batch_size=int(config["max_batch_size"]),
    )


def read_fingerprint(config: Mapping[str, Any]) -> str:
    """Read the fingerprint of the vector space from a model's configuration."""
    parameter = config.get("parameters", {}).get("fingerprint")
    if parameter is None:
        raise ServerError(
            f"model {config.get('name')!r} names no fingerprint: this project, or its present version, did not make it"
        )
    return str(parameter["string_value"])


def server_error(url: str, code: str, message: str) -> MirrorError:
    """Convert a server's error, its `code` gRPC's status or "HTTP 400", to our exception.

    `Rejected` for an invalid request, `NotServed` for an unknown model, `OverloadedError` if the model has too much to
    do, `UnavailableError` if it takes no requests at present, `DeadlineExceededError` if the request's time had passed;
    else `ServerError`.
    """
    reason = str(message)
    if code in ("INVALID_ARGUMENT", "HTTP 400"):
        return Rejected(reason)
    if code in ("NOT_FOUND", "HTTP 404"):
        return NotServed(f"{url} answered {code}: {reason}")
    if code == "DEADLINE_EXCEEDED" or _EXPIRED in reason:
        return DeadlineExceededError(f"{url} did not answer in time: {reason}")
    if DEAD_RUNNER in reason:  # Triton calls it INTERNAL. Nothing was computed, and mirror serve restarts it.
        return unreachable(url, f"answered {code}: {reason}")
    if code in ("UNAVAILABLE", "HTTP 503"):
        hint = _RETRY_HINT.search(reason)
        if hint:
            seconds = float(hint[1]) / (1000 if hint[2] == "ms" else 1)
            return OverloadedError(f"{url}: {reason}", seconds)
        return unreachable(url, f"answered {code}: {reason}")
    return ServerError(f"{url} answered {code}: {reason}")


def unreachable(url: str, reason: str) -> UnavailableError:
    """Build the error for a server that cannot be reached or takes no requests."""
    return UnavailableError(f"{url}: {reason}. Is the server running there, and is this the right port?")


def microseconds(timeout_s: float) -> int:
    """Convert a timeout to Triton's unit. The model skips requests whose timeout has passed."""
    return max(1, round(timeout_s * 1e6))


def text_tensor(library: Any, texts: NDArray[Any]) -> Any:
    """Build the model's input from an object array [n, 1] of bytes with tritonclient.grpc or tritonclient.http."""
    tensor = library.InferInput("TEXT", list(texts.shape), "BYTES")
    tensor.set_data_from_numpy(texts)
    return tensor


def read_reply(result: Any) -> Reply:
    """Read the model's outputs from tritonclient's result."""
    found = {name: result.as_numpy(name) for name in OUTPUTS}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ServerError(f"the reply has no {', '.join(missing)}: serve the model with mirror serve or mirror deploy")
    vectors, tokens, truncated, fingerprint = found.values()
    return Reply(vectors=vectors, tokens=tokens, truncated=truncated, fingerprint=fingerprint[0, 0].decode())
