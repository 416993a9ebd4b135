"""What the load generator sends: texts in turn, or a mix of good, bad and cancelled requests with known answers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.targets import GRPC, HTTP
from mirror_runtime.bundle import EncoderSpec, read_canaries
from mirror_runtime.encoder import Encoder
from mirror_runtime.vectors import Vectors, components, distance_problem

TEXTS_PER_REQUEST = {1: 0.80, 8: 0.15, 32: 0.05}
"""Sizes of the mix's requests, and how often each is drawn."""

LONG_TEXTS = 100
LONG_SHARE = 0.05
"""Of the texts of a request."""

FAKE_FLOOR = 0.99999
"""Cosine floor of the fake engine, which has no certificate: its vectors are a fixed function of the text."""

_CHARACTERS_PER_TOKEN = 5
"""Generous for English, so that some long texts exceed the encoder's limit and are truncated."""


class Kind(str, Enum):
    """Why a request is sent."""

    GOOD = "good"
    BAD_UTF8 = "bad UTF-8"
    UNKNOWN_PARAMETER = "unknown parameter"
    EMPTY = "empty request"
    CANCELLED = "cancelled"
    """A good request of the largest size that its caller cancels."""


KINDS = {Kind.GOOD: 0.95, Kind.BAD_UTF8: 0.01, Kind.UNKNOWN_PARAMETER: 0.01, Kind.EMPTY: 0.01, Kind.CANCELLED: 0.02}

REFUSALS = {Kind.BAD_UTF8: "not valid UTF-8", Kind.UNKNOWN_PARAMETER: "known are dimensions", Kind.EMPTY: ""}
"""Words that the refusal of a bad request must contain. Triton itself refuses the empty one."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to a target by its name, with the positions of its texts; none for an empty request."""

    kind: Kind = Kind.GOOD
    target: str
    chosen: tuple[int, ...]

    @property
    def label(self) -> str:
        """Target and texts, such as "grpc 8"."""
        return f"{self.target} {len(self.chosen)}"


class InTurn:
    """Requests of one size that go round `texts` texts; what is left at the end of a round is left out."""

    def __init__(self, target: str, texts: int, size: int) -> None:
        starts = range(0, max(1, texts - size + 1), size)
        self._requests = [
            Request(target=target, chosen=tuple(range(start, min(start + size, texts)))) for start in starts
        ]
        self._drawn = self.stream(0, 1)

    def stream(self, caller: int, callers: int) -> Iterator[Request]:
        """Go round the requests, each caller from a place of its own."""
        start = caller * len(self._requests) // callers
        return itertools.cycle(self._requests[start:] + self._requests[:start])

    def draw(self) -> Request:
        """Return the next request."""
        return next(self._drawn)


@dataclass(frozen=True, kw_only=True)
class ExpectedVectors:
    """Texts and their right vectors.

    Attributes:
        texts: canaries, the workload's texts, then long ones.
        components: float32 [texts, dim], components of the right vectors.
        floor: cosine below which a vector is wrong.
        spec: of the encoder.
        canaries: number of canaries among the texts.
        long_from: position of the first long text.
    """

    texts: tuple[str, ...]
    components: NDArray[np.float32]
    floor: float
    spec: EncoderSpec
    canaries: int
    long_from: int

    def problem(self, chosen: Sequence[int], vectors: Vectors) -> str:
        """Describe what is wrong with an answer, see `distance_problem`; "" if it is right."""
        expected = self.components[list(chosen)]
        if len(vectors) != len(chosen):
            return f"{len(vectors)} vectors for {len(chosen)} texts"
        found = components(vectors, self.spec)
        if found.shape != expected.shape:
            return f"vectors have shape {found.shape} where {expected.shape} is expected"
        if not np.isfinite(found).all():
            return "vectors are not finite"
        return distance_problem(found, expected, self.floor, [self.texts[at] for at in chosen])

    @classmethod
    def compute(cls, encoder: Encoder, bundle: Path, texts: Sequence[str], seed: int) -> ExpectedVectors:
        """Read the canaries' reference vectors and encode the workload and long texts made of it.

        Raises:
            BundleError: the canaries cannot be read.
            EngineError: the engine failed.
        """
        # The fake engine's vectors come from no model, so the reference's do not fit them.
        canaries = read_canaries(bundle) if encoder.artifact is not None else ()
        encoded = [*texts, *long_texts(texts, encoder.spec.max_tokens, seed)]
        vectors = components(encoder.encode(encoded), encoder.spec)
        references = np.array([canary.vector for canary in canaries], np.float32).reshape(-1, vectors.shape[1])
        return cls(
            texts=(*(canary.text for canary in canaries), *encoded),
            components=np.concatenate([references, vectors]),
            floor=FAKE_FLOOR if encoder.artifact is None else encoder.artifact.parity.floor,
            spec=encoder.spec,
            canaries=len(canaries),
            long_from=len(canaries) + len(texts),
        )


class Mix:
    """Random requests over both of Triton's protocols. The same seed draws the same ones."""

    def __init__(self, expected: ExpectedVectors, seed: int) -> None:
        self._expected, self._random = expected, random.Random(seed)

    def stream(self, caller: int, callers: int) -> Iterator[Request]:
        """Draw good requests; all callers draw from one sequence."""
        while True:
            yield self._request(Kind.GOOD)

    def draw(self) -> Request:
        """Draw a request of any kind."""
        (kind,) = self._random.choices(tuple(KINDS), tuple(KINDS.values()))
        return self._request(kind)

    def _request(self, kind: Kind) -> Request:
        (size,) = self._random.choices(tuple(TEXTS_PER_REQUEST), tuple(TEXTS_PER_REQUEST.values()))
        if kind is Kind.CANCELLED:
            size = max(TEXTS_PER_REQUEST)
        if kind is Kind.EMPTY:
            size = 0
        target = self._random.choice((GRPC, HTTP))
        return Request(kind=kind, target=target, chosen=tuple(self._text() for _ in range(size)))

    def _text(self) -> int:
        first_long, count = self._expected.long_from, len(self._expected.texts)
        if self._random.random() < LONG_SHARE:
            return self._random.randrange(first_long, count)
        return self._random.randrange(first_long)


RequestSource = InTurn | Mix
"""`stream` returns the endless requests of one of some callers, all good; `draw` the next of random arrivals."""


def long_texts(texts: Sequence[str], max_tokens: int, seed: int) -> list[str]:
    """Join texts into long ones of a quarter of the encoder's limit up to somewhat more than the limit."""
    draw = random.Random(seed)
    joined = []
    for _ in range(LONG_TEXTS):
        characters = _CHARACTERS_PER_TOKEN * draw.uniform(max_tokens / 4, max_tokens)
        parts: list[str] = []
        while sum(map(len, parts)) < characters:
            parts.append(draw.choice(texts))
        joined.append(" ".join(parts))
    return joined
