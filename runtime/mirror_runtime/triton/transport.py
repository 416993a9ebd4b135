"""What gRPC and HTTP have in common: how a request to Triton looks, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.errors import ServerError
from mirror_runtime.vectors import Vectors

OUTPUTS = ("EMBEDDING", "TOKENS", "TRUNCATED")


class Rejected(ServerError):
    """The server refused a request as invalid; its texts may be fine one by one."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one request of n texts brought back: [n, width] of the model's vector type, int32 [n, 1], bool [n, 1]."""

    vectors: Vectors
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]


class Transport(Protocol):
    """A connection to one model of one server."""

    body_bytes: int

    def submit(self, texts: NDArray[Any]) -> Callable[[], Reply]:
        """Send texts, an object array [n, 1] of bytes; calling the result waits for the reply or raises."""

    def config(self) -> Mapping[str, Any]:
        """Fetch the model's configuration."""

    def statistics(self) -> Mapping[str, Any]:
        """Fetch the model's counters."""

    def close(self) -> None:
        """Close the connections."""


def server_error(url: str, code: str, message: str, *, invalid: bool) -> ServerError:
    """Turn a server's answer into our exception: `Rejected` where the request itself was at fault."""
    reason = str(message)
    if invalid:
        return Rejected(reason)
    hint = " Is the server running there, and is this its gRPC port?" if code == "UNAVAILABLE" else ""
    return ServerError(f"{url} answered {code}: {reason}.{hint}")


def text_tensor(library: Any, texts: NDArray[Any]) -> Any:
    """Make the model's input, from an object array [n, 1] of bytes, with tritonclient.grpc or tritonclient.http."""
    tensor = library.InferInput("TEXT", list(texts.shape), "BYTES")
    tensor.set_data_from_numpy(texts)
    return tensor


def read_reply(result: Any) -> Reply:
    """Read the model's outputs from tritonclient's result."""
    vectors, tokens, truncated = (result.as_numpy(name) for name in OUTPUTS)
    return Reply(vectors=vectors, tokens=tokens, truncated=truncated)
