"""A call of many texts as requests of few, and the replies as one result. What both clients share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.async_encoder import CHARACTERS_PER_TOKEN
from mirror_runtime.client.protocol import Rejected, Reply
from mirror_runtime.encoder import Encoded
from mirror_runtime.errors import InputError, ServerError, TextError
from mirror_runtime.tokenizer import defect
from mirror_runtime.vectors import Vectors

REPLACEMENTS = 3
"""How often a model may be replaced during one call before the call gives up."""

_OWN_POSITION = re.compile(r"^.*?text \d+: ", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Served(Encoded):
    """`Encoded`, and the vector space that all of its vectors lie in.

    Attributes:
        fingerprint: of the model that answered; None where there was nothing to send.
    """

    fingerprint: str | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large a request may be.

    Attributes:
        texts: at most.
        tokens: at most, as estimated from the texts' lengths; one text alone may have more.
        body_bytes: at most; a text of more is refused.
    """

    texts: int
    tokens: int
    body_bytes: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The texts of one request: their positions in what the caller passed, and their UTF-8."""

    positions: tuple[int, ...]
    texts: tuple[bytes, ...]

    def tensor(self) -> NDArray[Any]:
        """Give the texts as an object array [n, 1] of bytes."""
        return np.array(self.texts, dtype=np.object_).reshape(-1, 1)

    def halves(self) -> tuple[Chunk, Chunk]:
        """Cut a request in two, to find the text that the server refuses."""
        cut = len(self.texts) // 2
        return (
            Chunk(positions=self.positions[:cut], texts=self.texts[:cut]),
            Chunk(positions=self.positions[cut:], texts=self.texts[cut:]),
        )

    def fault(self, error: Rejected) -> TextError:
        """Give the error of a request of one text as that text's."""
        return TextError(self.positions[0], _OWN_POSITION.sub("", error.reason))


def listed(texts: Iterable[object]) -> list[object]:
    """Give the caller's texts as a list.

    Raises:
        InputError: it is one string, which would be encoded letter by letter.
    """
    if isinstance(texts, (str, bytes)):
        raise InputError(f"texts is one {type(texts).__name__}: pass a list, such as [text]")
    return list(texts)


def chunked(texts: Sequence[object], limits: Limits, errors: dict[int, TextError]) -> Iterator[Chunk]:
    """Group texts into requests, in order. What is no text gets an entry in `errors` instead."""
    positions: list[int] = []
    held: list[bytes] = []
    size = tokens = 0
    for position, text in enumerate(texts):
        raw = _utf8(position, text, limits.body_bytes)
        if isinstance(raw, TextError):
            errors[position] = raw
            continue
        more = 2 + len(str(text)) // CHARACTERS_PER_TOKEN
        if held and (len(held) == limits.texts or size + len(raw) > limits.body_bytes or tokens + more > limits.tokens):
            yield Chunk(positions=tuple(positions), texts=tuple(held))
            positions, held, size, tokens = [], [], 0, 0
        positions.append(position)
        held.append(raw)
        size += len(raw) + 4
        tokens += more
    if held:
        yield Chunk(positions=tuple(positions), texts=tuple(held))


def outdated(replies: Sequence[tuple[Chunk, Reply]]) -> list[Chunk]:
    """Name the requests that another model answered than the last one: those vectors cannot be compared with its."""
    return [chunk for chunk, reply in replies if reply.fingerprint != replies[-1][1].fingerprint]


def current(replies: Sequence[tuple[Chunk, Reply]]) -> list[tuple[Chunk, Reply]]:
    """Give the replies of the model that answered last."""
    return [pair for pair in replies if pair[1].fingerprint == replies[-1][1].fingerprint]


def check_fingerprint(expected: str | None, replies: Sequence[tuple[Chunk, Reply]]) -> None:
    """See that the vectors lie in the space that the caller wants.

    Raises:
        ServerError: they lie in another one.
    """
    for _, reply in replies:
        if expected is not None and reply.fingerprint != expected:
            raise ServerError(
                f"the server gives vectors of {reply.fingerprint} where {expected} is expected: it serves another "
                "model, whose vectors cannot be compared with the wanted ones"
            )


def assembled(
    count: int,
    replies: Sequence[tuple[Chunk, Reply]],
    errors: dict[int, TextError],
    empty: Vectors,
) -> Served:
    """Put replies into the order of the caller's texts.

    Args:
        count: of the caller's texts.
        replies: of one model.
        errors: the texts without a vector.
        empty: the vectors of a call without any reply.
    """
    pattern = replies[0][1].vectors if replies else empty
    vectors = np.zeros((count, pattern.shape[1]), pattern.dtype)
    tokens = np.zeros(count, dtype=np.int64)
    truncated = np.zeros(count, dtype=np.bool_)
    for chunk, reply in replies:
        positions = list(chunk.positions)
        vectors[positions] = reply.vectors
        tokens[positions] = reply.tokens[:, 0]
        truncated[positions] = reply.truncated[:, 0]
    return Served(
        vectors=vectors,
        tokens=tokens,
        truncated=truncated,
        errors=errors,
        fingerprint=replies[0][1].fingerprint if replies else None,
    )


def _utf8(position: int, text: object, limit: int) -> bytes | TextError:
    wrong = defect(position, text)
    if wrong is not None:
        return wrong
    raw = str(text).encode("utf-8")
    if len(raw) > limit:
        return TextError(position, f"is {len(raw)} bytes of UTF-8; one request carries {limit}: shorten it")
    return raw
