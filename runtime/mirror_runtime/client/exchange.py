"""One call of `encode` without any I/O (sans-I/O): which requests to send, and what follows a reply or an error.

Both clients drive it: they ask for a request, send it, and hand back the reply or the exception. Everything else
happens here: texts are grouped into requests; a request that the server refused for now is repeated after a pause; a
request that it rejected is halved until the rejected texts stand alone; requests answered by a model that has
since been replaced are repeated; the replies become one result.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.async_encoder import estimate_tokens
from mirror_runtime.client.protocol import (
    PROBE_TEXT,
    ClientOptions,
    ModelFacts,
    NotServed,
    Parameters,
    Rejected,
    Reply,
)
from mirror_runtime.encoder import Encoded
from mirror_runtime.errors import (
    DeadlineExceededError,
    InputError,
    MirrorError,
    OverloadedError,
    ServerError,
    TextError,
    UnavailableError,
)
from mirror_runtime.tokenizer import validate_text

BATCH_TOKENS = 8192
"""Default limit of estimated tokens in a request: 32 texts of 256. It keeps requests of longer texts short too."""

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0

REPLACEMENTS = 3
"""How often a model may be replaced during one call before the call fails."""

_PARAMETER = re.compile(r"\bparameter '")
_TEXT_POSITION = re.compile(r"^.*?text \d+: ", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Served(Encoded):
    """`Encoded`, and the vector space that all of its vectors lie in.

    Attributes:
        fingerprint: of the model that answered; None if nothing was sent.
    """

    fingerprint: str | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """The texts of one request, and how often it has been tried."""

    positions: tuple[int, ...]  # of its texts in the caller's list
    texts: tuple[bytes, ...]  # UTF-8
    pause_s: float = 0.0  # to wait before sending it
    tries: int = 0  # how often the server refused it for now
    gives_up_at: float | None = None  # on the monotonic clock; None before the first try

    def tensor(self) -> NDArray[Any]:
        """Return the texts as an object array [n, 1] of bytes."""
        return np.array(self.texts, dtype=np.object_).reshape(-1, 1)

    def halves(self) -> tuple[Request, Request]:
        """Split a rejected request in two, to find the text at fault."""
        cut = len(self.texts) // 2
        return (
            Request(positions=self.positions[:cut], texts=self.texts[:cut]),
            Request(positions=self.positions[cut:], texts=self.texts[cut:]),
        )


PROBE = Request(positions=(0,), texts=(PROBE_TEXT,))
"""A request that every encoder can answer."""


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """Options of one call of `encode`, see `Client.encode_detailed`; None leaves an option to the server."""

    batch_size: int
    deadline_s: float | None
    truncate: bool | None
    dimensions: int | None
    prompt: str | None
    query: str | None
    speed: str | None

    def parameters(self) -> Parameters:
        """Return the parameters that every request of the call carries."""
        options = {"truncate": self.truncate, "dimensions": self.dimensions, "prompt": self.prompt}
        options |= {"query": self.query, "speed": self.speed}
        return {name: value for name, value in options.items() if value is not None}


class Exchange:
    """The requests of one call, what became of them, and the result.

    A client repeats, while `next_round()` is true: take requests with `next_request()` until it returns None, wait for
    `request.pause_s`, send each with `parameters` and `remaining_s()`, and pass the outcome to `succeeded` or `failed`.
    A text of more than `body_bytes` bytes of UTF-8 gets an error.
    """

    def __init__(
        self,
        texts: Sequence[object],
        call: CallOptions,
        client: ClientOptions,
        facts: ModelFacts,
        *,
        body_bytes: int,
    ) -> None:
        if not 1 <= call.batch_size <= facts.max_batch_size:
            raise InputError(
                f"batch_size is {call.batch_size}: this server takes 1 to {facts.max_batch_size} texts a request"
            )
        self._call, self._client, self._facts = call, client, facts
        self._ends_at = math.inf if call.deadline_s is None else time.monotonic() + call.deadline_s
        self.count = len(texts)
        self.parameters = call.parameters()
        self._errors: dict[int, TextError] = {}
        self._unsent = self._grouped(texts, body_bytes)
        self._again: deque[Request] = deque()
        self._replies: list[tuple[Request, Reply]] = []
        self._rounds = 0

    def next_round(self) -> bool:
        """Return whether there are requests to send, at the start and after every request has been answered.

        Requests answered by a model that has since been replaced come again: their vectors cannot be compared.
        """
        self._rounds += 1
        if self._rounds == 1:
            return True
        last = self._replies[-1][1].fingerprint if self._replies else None
        outdated = [request for request, reply in self._replies if reply.fingerprint != last]
        if outdated and self._rounds > REPLACEMENTS + 1:
            raise ServerError("the model was replaced again and again during the call: try later")
        self._replies = [pair for pair in self._replies if pair[1].fingerprint == last]
        self._again.extend(replace(request, pause_s=0.0, tries=0, gives_up_at=None) for request in outdated)
        return bool(outdated)

    def next_request(self) -> Request | None:
        """Return the next request to send; None if there is none at present."""
        request = self._again.popleft() if self._again else next(self._unsent, None)
        if request is None or request.gives_up_at is not None:
            return request
        return replace(request, gives_up_at=min(self._ends_at, time.monotonic() + self._client.timeout_s))

    def remaining_s(self) -> float:
        """Return the seconds that a request sent now may take; raise a `DeadlineExceededError` if none remain."""
        remaining = min(self._client.timeout_s, self._ends_at - time.monotonic())
        if remaining <= 0:
            raise DeadlineExceededError("deadline_s has passed before all texts were answered")
        return remaining

    def succeeded(self, request: Request, reply: Reply) -> None:
        """Keep a reply."""
        self._replies.append((request, reply))

    def failed(self, request: Request, error: MirrorError) -> None:
        """Decide what follows an error: the request again after a pause, its halves, one text's error, or raise it."""
        if isinstance(error, Rejected):
            if _PARAMETER.search(error.reason):  # no text is at fault
                raise InputError(error.reason)
            if len(request.texts) > 1:
                self._again.extendleft(reversed(request.halves()))
            else:
                position = request.positions[0]
                self._errors[position] = TextError(position, _TEXT_POSITION.sub("", error.reason))
            return
        if isinstance(error, OverloadedError) and self._client.patient:
            pause_s = pause_before(request.tries, error.retry_after_s)
        elif isinstance(error, (UnavailableError, NotServed)):  # it was served: its configuration has been read
            pause_s = pause_before(request.tries, None)
        else:
            raise error
        if time.monotonic() + pause_s >= (request.gives_up_at or math.inf):
            raise error
        self._again.appendleft(replace(request, pause_s=pause_s, tries=request.tries + 1))

    def result(self) -> Served:
        """Put the replies into the order of the caller's texts; raise if they lie in another space than expected."""
        fingerprint = self._replies[0][1].fingerprint if self._replies else None
        if fingerprint is not None and self._client.fingerprint not in (None, fingerprint):
            raise ServerError(
                f"the server returns vectors of {fingerprint} where {self._client.fingerprint} is expected: it serves "
                "another model, whose vectors cannot be compared"
            )
        empty = self._replies[0][1].vectors[:0] if self._replies else self._facts.empty(self._call.dimensions)
        vectors = np.zeros((self.count, empty.shape[1]), empty.dtype)
        tokens = np.zeros(self.count, dtype=np.int64)
        truncated = np.zeros(self.count, dtype=np.bool_)
        for request, reply in self._replies:
            positions = list(request.positions)
            vectors[positions] = reply.vectors
            tokens[positions] = reply.tokens[:, 0]
            truncated[positions] = reply.truncated[:, 0]
        return Served(vectors=vectors, tokens=tokens, truncated=truncated, errors=self._errors, fingerprint=fingerprint)

    def _grouped(self, texts: Sequence[object], body_bytes: int) -> Iterator[Request]:
        """Group texts into requests, in order. What is not a text, or is too long, gets an error instead."""
        positions: list[int] = []
        held: list[bytes] = []
        size = tokens = 0
        for position, text in enumerate(texts):
            raw = _utf8(position, text, body_bytes)
            if isinstance(raw, TextError):
                self._errors[position] = raw
                continue
            more = estimate_tokens(str(text))
            if held and (
                len(held) == self._call.batch_size
                or size + len(raw) > body_bytes
                or tokens + more > self._client.batch_tokens
            ):
                yield Request(positions=tuple(positions), texts=tuple(held))
                positions, held, size, tokens = [], [], 0, 0
            positions.append(position)
            held.append(raw)
            size += len(raw) + 4
            tokens += more
        if held:
            yield Request(positions=tuple(positions), texts=tuple(held))


def as_list(texts: Iterable[object]) -> list[object]:
    """Return the caller's texts as a list; refuse a single string, which would be encoded letter by letter."""
    if isinstance(texts, (str, bytes)):
        raise InputError(f"texts is one {type(texts).__name__}: pass a list, such as [text]")
    return list(texts)


def pause_before(tries: int, hint_s: float | None, jitter: Callable[[float, float], float] = random.uniform) -> float:
    """Return the seconds to wait before a refused request is repeated: the server's hint plus a random part.

    The random part has full jitter, which spreads clients that were refused together, and a bound that doubles.
    """
    return (hint_s or 0.0) + jitter(0.0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(tries, 10)))


def _utf8(position: int, text: object, limit: int) -> bytes | TextError:
    problem = validate_text(position, text)
    if problem is not None:
        return problem
    raw = str(text).encode("utf-8")
    if len(raw) > limit:
        return TextError(position, f"is {len(raw)} bytes of UTF-8; one request carries {limit}: shorten it")
    return raw
