"""Answer a batch of requests with one call of the encoder. Knows nothing of Triton's own classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.encoder import Encoded, Encoder
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model.request_options import NONE, RequestOptions
from mirror_runtime.vectors import Vectors, cut

BYTES_PER_TOKEN = 4
"""To guess a text's tokens before it is tokenised; 3.5 to 5 in English prose."""

BYTES_READ_PER_TOKEN_RUN = 128
"""How many bytes are tokenised in the time that one token takes to run."""


LARGEST_REQUEST = 8_000_000
"""Bytes of text in one request: what takes some seconds to tokenise. Unbounded, one caller could hold up all others."""


class FailureKind(str, Enum):
    """Whose fault a failed request is; the values are the names of Triton's error codes."""

    INVALID_ARG = "INVALID_ARG"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What one request of b texts gets.

    Attributes:
        vectors: [b, width] of the encoder's vector type; fewer columns where the request asked for fewer dimensions.
        tokens: int32 [b, 1], tokens of the whole text, special tokens and prompt included.
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


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """One request: b texts and what is asked of them.

    Attributes:
        texts: UTF-8 bytes, an array of any shape with b elements.
        wishes: what the request's parameters say.
    """

    texts: NDArray[Any]
    wishes: RequestOptions = NONE

    @property
    def sizes(self) -> list[int]:
        """Bytes of each text, prompt included."""
        more = len(self.wishes.prompt.encode())
        return [len(raw) + more for raw in self.texts.reshape(-1)]

    def tokens(self, max_tokens: int) -> int:
        """Guess the work, as a number of tokens to run; long texts count with their reading too."""
        return sum(
            min(2 + size // BYTES_PER_TOKEN, max_tokens) + size // BYTES_READ_PER_TOKEN_RUN for size in self.sizes
        )


def answer(encoder: Encoder, questions: Sequence[EmbedRequest], long_texts: LongTexts) -> list[EmbedResult | Failure]:
    """Encode the texts of all requests together and hand each request its own.

    Args:
        encoder: what turns texts into vectors.
        questions: the requests.
        long_texts: the policy where a request names none.

    Returns:
        One answer or failure a request, in order. A request fails as a whole when one of its texts cannot be
        encoded; the others are unharmed.

    Raises:
        Exception: whatever the engine raises; the whole batch has failed then.
    """
    failures: dict[int, Failure] = {}
    texts: list[str] = []
    policies: list[LongTexts] = []
    spans: dict[int, slice] = {}
    for number, question in enumerate(questions):
        decoded = _decode(question)
        if isinstance(decoded, Failure):
            failures[number] = decoded
        else:
            spans[number] = slice(len(texts), len(texts) + len(decoded))
            texts.extend(decoded)
            policies += [question.wishes.long_texts or long_texts] * len(decoded)
    if not spans:
        return [failures[number] for number in range(len(questions))]

    encoded = encoder.finish(encoder.begin(texts, direct=True, long_texts=policies))
    answers: dict[int, EmbedResult | Failure] = dict(failures)
    for number, span in spans.items():
        answers[number] = _own(encoded, span, questions[number].wishes, encoder.spec)
    return [answers[number] for number in range(len(questions))]


def _own(encoded: Encoded, span: slice, wishes: RequestOptions, spec: EncoderSpec) -> EmbedResult | Failure:
    """Give one request its part of what was encoded together."""
    bad = next((i for i in range(span.start, span.stop) if i in encoded.errors), None)
    if bad is not None:
        return _invalid(bad - span.start, encoded.errors[bad].reason)
    shorter = wishes.dimensions not in (None, spec.dim)
    vectors = encoded.vectors[span]
    return EmbedResult(
        vectors=cut(vectors, wishes.dimensions, normalize=spec.normalize and shorter),
        tokens=encoded.tokens[span, np.newaxis].astype(np.int32),
        truncated=encoded.truncated[span, np.newaxis],
    )


def _decode(question: EmbedRequest) -> list[str] | Failure:
    texts: list[str] = []
    prompt = question.wishes.prompt
    for position, raw in enumerate(question.texts.reshape(-1)):
        try:
            texts.append(prompt + bytes(raw).decode("utf-8"))
        except UnicodeDecodeError as error:
            at = f"byte {error.object[error.start]:#04x} at offset {error.start}"
            return _invalid(position, f"not valid UTF-8 ({at}): send the text encoded as UTF-8")
    return texts


def _invalid(position: int, reason: str) -> Failure:
    return Failure(kind=FailureKind.INVALID_ARG, message=f"text {position}: {reason}")
