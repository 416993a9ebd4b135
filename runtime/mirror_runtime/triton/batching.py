"""Answer a batch of Triton requests with one call of the encoder. Knows nothing of Triton's own classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.encoder import Encoder
from mirror_runtime.vectors import Vectors


class FailureKind(str, Enum):
    """Whose fault a failed request is; the values are the names of Triton's error codes."""

    INVALID_ARG = "INVALID_ARG"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one request of b texts gets.

    Attributes:
        vectors: [b, width] of the encoder's vector type.
        tokens: int32 [b, 1], tokens of the whole text, special tokens included.
        truncated: bool [b, 1], whether the text was longer than the encoder takes.
    """

    vectors: Vectors
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why one request gets no vectors. The message goes to the client: it holds no path and no traceback."""

    kind: FailureKind
    message: str


def answer(encoder: Encoder, requests: Sequence[NDArray[Any]]) -> list[Answer | Failure]:
    """Encode the texts of all requests together and hand each request its own.

    Args:
        encoder: what turns texts into vectors.
        requests: one array of UTF-8 bytes a request, of any shape; b elements each.

    Returns:
        One answer or failure a request, in order. A request fails as a whole when one of its texts cannot be
        encoded; the others are unharmed.

    Raises:
        Exception: whatever the engine raises; the whole batch has failed then.
    """
    failures: dict[int, Failure] = {}
    texts: list[str] = []
    spans: dict[int, slice] = {}
    for number, request in enumerate(requests):
        decoded = _decode(request)
        if isinstance(decoded, Failure):
            failures[number] = decoded
        else:
            spans[number] = slice(len(texts), len(texts) + len(decoded))
            texts.extend(decoded)
    if not spans:
        return [failures[number] for number in range(len(requests))]

    encoded = encoder.encode_detailed(texts)
    answers: dict[int, Answer | Failure] = dict(failures)
    for number, span in spans.items():
        bad = next((i for i in range(span.start, span.stop) if i in encoded.errors), None)
        if bad is not None:
            reason = encoded.errors[bad].reason
            answers[number] = _invalid(bad - span.start, reason)
            continue
        answers[number] = Answer(
            vectors=encoded.vectors[span],
            tokens=encoded.tokens[span, np.newaxis].astype(np.int32),
            truncated=encoded.truncated[span, np.newaxis],
        )
    return [answers[number] for number in range(len(requests))]


def _decode(request: NDArray[Any]) -> list[str] | Failure:
    texts: list[str] = []
    for position, raw in enumerate(request.reshape(-1)):
        try:
            texts.append(bytes(raw).decode("utf-8"))
        except UnicodeDecodeError as error:
            at = f"byte {error.object[error.start]:#04x} at offset {error.start}"
            return _invalid(position, f"not valid UTF-8 ({at}): send the text encoded as UTF-8")
    return texts


def _invalid(position: int, reason: str) -> Failure:
    return Failure(kind=FailureKind.INVALID_ARG, message=f"text {position}: {reason}")
