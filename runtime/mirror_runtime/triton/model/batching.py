"""Answer a batch of requests with one call of the encoder. Independent of Triton's own classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.client.protocol import PROBE_TEXT
from mirror_runtime.encoder import Encoded, Encoder
from mirror_runtime.errors import NotFiniteError
from mirror_runtime.tokenizer import Item, LongTexts
from mirror_runtime.triton.model.request_options import DEFAULTS, RequestOptions
from mirror_runtime.vectors import Vectors, cut

BYTES_PER_TOKEN = 4
"""For estimating a text's tokens before it is tokenised; English prose has 3.5 to 5."""

TOKENISED_BYTES_PER_TOKEN = 128
"""Bytes that are tokenised in the time in which the engine runs one token."""

LARGEST_REQUEST = 8_000_000
"""Most bytes of text in one request: some seconds of tokenising. Without a limit, one caller could delay all others."""


class FailureKind(str, Enum):
    """Why a request failed; the values are the names of Triton's error codes."""

    INVALID_ARG = "INVALID_ARG"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """The answer to one request of b texts."""

    vectors: Vectors  # of the encoder's vector type; fewer columns if the request asked for fewer dimensions
    tokens: NDArray[np.int32]  # [b, 1], of the whole text, special tokens and prompt included
    truncated: NDArray[np.bool_]  # [b, 1], whether the text was longer than the encoder takes


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why one request gets no vectors. The message goes to the client: it contains no path and no traceback."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """One request of b texts, or a slice of one."""

    texts: NDArray[Any]  # UTF-8 bytes, an array of any shape with b elements
    options: RequestOptions = DEFAULTS
    first: int = 0  # position of the first text in the whole request

    @property
    def is_probe(self) -> bool:
        """Whether it is a health check, which comes every second and whose sender does not mind waiting."""
        return self.texts.size == 1 and self.texts.flat[0] == PROBE_TEXT

    @property
    def sizes(self) -> list[int]:
        """Bytes of each text, prompt and query included."""
        prompt = len(self.options.prompt.encode()) + len((self.options.query or "").encode())
        return [len(raw) + prompt for raw in self.texts.reshape(-1)]

    def estimated_tokens(self, max_tokens: int) -> int:
        """Estimate the work as a number of tokens to run; tokenising long texts counts too."""
        return sum(_estimated_tokens(size, max_tokens) for size in self.sizes)

    def slices(self, max_tokens: int, tokens: int) -> list[EmbedRequest]:
        """Split the request into slices of at most `tokens` estimated tokens, or a single text."""
        cuts, held = [0], 0
        for position, size in enumerate(self.sizes):
            more = _estimated_tokens(size, max_tokens)
            if held and held + more > tokens:
                cuts.append(position)
                held = 0
            held += more
        texts = self.texts.reshape(-1)
        return [
            replace(self, texts=texts[start:stop], first=start)
            for start, stop in zip(cuts, [*cuts[1:], texts.size], strict=True)
        ]


def _estimated_tokens(size: int, max_tokens: int) -> int:
    return min(2 + size // BYTES_PER_TOKEN, max_tokens) + size // TOKENISED_BYTES_PER_TOKEN


def joined(results: Sequence[EmbedResult]) -> EmbedResult:
    """Join the results of a request's slices."""
    if len(results) == 1:
        return results[0]
    return EmbedResult(
        vectors=np.concatenate([result.vectors for result in results]),
        tokens=np.concatenate([result.tokens for result in results]),
        truncated=np.concatenate([result.truncated for result in results]),
    )


def embed(encoder: Encoder, requests: Sequence[EmbedRequest], long_texts: LongTexts) -> list[EmbedResult | Failure]:
    """Encode the texts of all requests together; return one result or failure per request, in order.

    A request fails as a whole if one of its texts cannot be encoded; the others are unaffected. Raises what the engine
    raises: then the whole batch has failed. `long_texts` is the policy for requests that name none.
    """
    outcomes: dict[int, EmbedResult | Failure] = {}
    texts: list[Item] = []
    policies: list[LongTexts] = []
    spans: dict[int, slice] = {}
    for number, request in enumerate(requests):
        decoded = _decode(request, encoder.spec)
        if isinstance(decoded, Failure):
            outcomes[number] = decoded
        else:
            spans[number] = slice(len(texts), len(texts) + len(decoded))
            texts.extend(decoded)
            policies += [request.options.long_texts or long_texts] * len(decoded)
    if spans:
        encoded = encoder.finish(encoder.begin(texts, direct=True, long_texts=policies))
        for number, span in spans.items():
            outcomes[number] = _select(encoded, span, requests[number], encoder.spec)
    return [outcomes[number] for number in range(len(requests))]


def _select(encoded: Encoded, span: slice, request: EmbedRequest, spec: EncoderSpec) -> EmbedResult | Failure:
    """Select one request's part of a batch."""
    options = request.options
    failed = next((i for i in range(span.start, span.stop) if i in encoded.errors), None)
    if failed is not None:
        position, error = failed - span.start + request.first, encoded.errors[failed]
        if isinstance(error, NotFiniteError):
            return Failure(kind=FailureKind.INTERNAL, message=f"text {position} {error.reason}")
        return _invalid(position, error.reason)
    shorter = options.dimensions not in (None, spec.dim)
    return EmbedResult(
        vectors=cut(encoded.vectors[span], options.dimensions, normalize=spec.normalize and shorter),
        tokens=encoded.tokens[span, np.newaxis].astype(np.int32),
        truncated=encoded.truncated[span, np.newaxis],
    )


def _decode(request: EmbedRequest, spec: EncoderSpec) -> list[Item] | Failure:
    texts: list[Item] = []
    query = PROBE_TEXT.decode() if request.is_probe and request.options.query is None else request.options.query
    if spec.scores_pairs and query is None:
        return Failure(
            kind=FailureKind.INVALID_ARG, message="parameter 'query' is missing: a reranker scores texts against it"
        )
    for position, raw in enumerate(request.texts.reshape(-1), request.first):
        try:
            text = request.options.prompt + bytes(raw).decode("utf-8")
            texts.append((str(query), text) if spec.scores_pairs else text)
        except UnicodeDecodeError as error:
            at = f"byte {error.object[error.start]:#04x} at offset {error.start}"
            return _invalid(position, f"not valid UTF-8 ({at}): send the text encoded as UTF-8")
    return texts


def _invalid(position: int, reason: str) -> Failure:
    return Failure(kind=FailureKind.INVALID_ARG, message=f"text {position}: {reason}")
