"""What gRPC and HTTP have in common: how a request to Triton looks, and what comes back."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import VectorType
from mirror_runtime.errors import DeadlineExceededError, MirrorError, OverloadedError, ServerError, UnavailableError
from mirror_runtime.vectors import Vectors

MODEL_NAME = "embed"

DATA_TYPES: Mapping[VectorType, str] = MappingProxyType(
    {
        VectorType.FLOAT32: "TYPE_FP32",
        VectorType.FLOAT16: "TYPE_FP16",
        VectorType.INT8: "TYPE_INT8",
        VectorType.BINARY: "TYPE_UINT8",
    }
)
"""What Triton calls the numbers of a vector."""

OUTPUTS = ("EMBEDDING", "TOKENS", "TRUNCATED", "FINGERPRINT")

Parameters: TypeAlias = Mapping[str, "str | int | bool"]
"""Of one request, by name."""

DEAD_RUNNER = "is not healthy"
"""What Triton says when the process that runs a model is dead or stands still, until it is started again."""

_EXPIRED = "was over before work on it began"
_RETRY_HINT = re.compile(r"retry (?:after|in) (\d+(?:\.\d+)?) ?(ms|s)\b")


class Rejected(ServerError):
    """The server refused a request as invalid; its texts may be fine one by one."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one request of n texts brought back.

    Attributes:
        vectors: [n, width] of the model's vector type.
        tokens: int32 [n, 1].
        truncated: bool [n, 1].
        fingerprint: of the vector space.
    """

    vectors: Vectors
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    fingerprint: str


class Transport(Protocol):
    """A connection to one model of one server."""

    body_bytes: int

    def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Callable[[], Reply]:
        """Send texts, an object array [n, 1] of bytes; calling the result waits for the reply or raises."""

    def config(self) -> Mapping[str, Any]:
        """Fetch the model's configuration."""

    def statistics(self) -> Mapping[str, Any]:
        """Fetch the model's counters."""

    def close(self) -> None:
        """Close the connections."""


class AsyncTransport(Protocol):
    """The same for asyncio. Cancelling the task that waits cancels the request."""

    body_bytes: int

    def submit(self, texts: NDArray[Any], parameters: Parameters, timeout_s: float) -> Awaitable[Reply]:
        """Send texts, an object array [n, 1] of bytes, and wait for the reply."""

    def config(self, timeout_s: float) -> Awaitable[Mapping[str, Any]]:
        """Fetch the model's configuration."""

    def close(self) -> Awaitable[None]:
        """Close the connections."""


def server_error(url: str, code: str, message: str) -> MirrorError:
    """Turn a server's answer into our exception.

    Args:
        url: host and port, for the message.
        code: gRPC's status, or "HTTP 400".
        message: what the server said.

    Returns:
        `Rejected` where the request itself was at fault, `OverloadedError` where the model has too much to do,
        `UnavailableError` where it takes nothing for now, `DeadlineExceededError` where the time was over, else
        `ServerError`.
    """
    reason = str(message)
    if code in ("INVALID_ARGUMENT", "HTTP 400"):
        return Rejected(reason)
    if code == "DEADLINE_EXCEEDED" or _EXPIRED in reason:
        return DeadlineExceededError(f"{url} did not answer in time: {reason}")
    if DEAD_RUNNER in reason:  # Triton calls it INTERNAL. Nothing was computed, and mirror serve starts it again.
        return unreachable(url, f"answered {code}: {reason}")
    if code in ("UNAVAILABLE", "HTTP 503"):
        hint = _RETRY_HINT.search(reason)
        if hint:
            seconds = float(hint[1]) / (1000 if hint[2] == "ms" else 1)
            return OverloadedError(f"{url}: {reason}", seconds)
        return unreachable(url, f"answered {code}: {reason}")
    return ServerError(f"{url} answered {code}: {reason}")


def unreachable(url: str, what: str) -> UnavailableError:
    """Say that nobody usable listens."""
    return UnavailableError(f"{url}: {what}. Is the server running there, and is this the right port?")


def microseconds(timeout_s: float) -> int:
    """Give a request's deadline as Triton has it, so that the model need not begin what nobody waits for any more."""
    return max(1, round(timeout_s * 1e6))


def text_tensor(library: Any, texts: NDArray[Any]) -> Any:
    """Make the model's input, from an object array [n, 1] of bytes, with tritonclient.grpc or tritonclient.http."""
    tensor = library.InferInput("TEXT", list(texts.shape), "BYTES")
    tensor.set_data_from_numpy(texts)
    return tensor


def read_reply(result: Any) -> Reply:
    """Read the model's outputs from tritonclient's result.

    Raises:
        ServerError: one is missing.
    """
    found = {name: result.as_numpy(name) for name in OUTPUTS}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ServerError(f"the answer has no {', '.join(missing)}: serve the model with mirror serve or mirror deploy")
    vectors, tokens, truncated, fingerprint = found.values()
    return Reply(vectors=vectors, tokens=tokens, truncated=truncated, fingerprint=fingerprint[0, 0].decode())
