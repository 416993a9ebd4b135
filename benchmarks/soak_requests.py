"""What a soak sends: a mix of good, bad and cancelled requests, and the vectors that right answers hold."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec, read_canaries
from mirror_runtime.encoder import Encoder
from mirror_runtime.vectors import Vectors, components, distance_problem

PROTOCOLS = ("grpc", "http")

SIZES = {1: 0.80, 8: 0.15, 32: 0.05}
"""Texts a request, and how often."""

LONG_TEXTS = 100
LONG_SHARE = 0.05
"""Of the texts of a request."""

EXACT_FLOOR = 0.99999
"""Of the fake engine, which has no certificate: its vectors are a fixed function of the text."""

_CHARACTERS_A_TOKEN = 5
"""Of English, generously: some long texts come out longer than the encoder takes and are cut."""

_REFUSALS = {
    "bad UTF-8": "not valid UTF-8",
    "unknown parameter": "known are dimensions",
    "empty request": "",
}
"""What a bad request is told, its own words among others. Triton itself refuses the empty one."""


class Wish(str, Enum):
    """What a request is for."""

    GOOD = "good"
    BAD_UTF8 = "bad UTF-8"
    UNKNOWN_PARAMETER = "unknown parameter"
    EMPTY = "empty request"
    CANCELLED = "cancelled"
    """A good one of the largest size that its caller gives up."""


WISHES = {Wish.GOOD: 0.95, Wish.BAD_UTF8: 0.01, Wish.UNKNOWN_PARAMETER: 0.01, Wish.EMPTY: 0.01, Wish.CANCELLED: 0.02}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        chosen: the texts' places among the expected ones; empty for an empty request.
    """

    wish: Wish
    protocol: str
    chosen: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Protocol and texts, such as "grpc 8"."""
        return f"{self.protocol} {len(self.chosen)}"

    @property
    def refusal(self) -> str:
        """What its refusal must say, where it is a bad one."""
        return _REFUSALS[self.wish.value]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Texts and their right vectors.

    Attributes:
        texts: canaries, the workload's texts, then long ones.
        components: float32 [n, dim], what the right vectors stand for.
        floor: the cosine below which a vector is wrong.
        spec: of the encoder.
        canaries: how many of the texts are canaries.
        long_from: the place of the first long text.
    """

    texts: tuple[str, ...]
    components: NDArray[np.float32]
    floor: float
    spec: EncoderSpec
    canaries: int
    long_from: int

    def problem(self, chosen: Sequence[int], vectors: Vectors) -> str:
        """Describe what is wrong with an answer; empty where nothing is. Vectors are held to `distance_problem`."""
        wanted = self.components[list(chosen)]
        if len(vectors) != len(chosen):
            return f"{len(vectors)} vectors for {len(chosen)} texts"
        found = components(vectors, self.spec)
        if found.shape != wanted.shape:
            return f"vectors are {found.shape} where {wanted.shape} is expected"
        if not np.isfinite(found).all():
            return "vectors are not finite"
        return distance_problem(found, wanted, self.floor, [self.texts[i] for i in chosen])


class Mix:
    """Draws requests. The same seed gives the same ones."""

    def __init__(self, expected: Expected, seed: int) -> None:
        self._expected = expected
        self._random = random.Random(seed)

    def draw(self) -> Request:
        """Draw one of all kinds."""
        (wish,) = self._random.choices(tuple(WISHES), tuple(WISHES.values()))
        return self._request(wish)

    def good(self) -> Request:
        """Draw a good one."""
        return self._request(Wish.GOOD)

    def _request(self, wish: Wish) -> Request:
        (size,) = self._random.choices(tuple(SIZES), tuple(SIZES.values()))
        if wish is Wish.CANCELLED:
            size = max(SIZES)
        if wish is Wish.EMPTY:
            size = 0
        return Request(
            wish=wish,
            protocol=self._random.choice(PROTOCOLS),
            chosen=tuple(self._text() for _ in range(size)),
        )

    def _text(self) -> int:
        first_long, count = self._expected.long_from, len(self._expected.texts)
        if self._random.random() < LONG_SHARE:
            return self._random.randrange(first_long, count)
        return self._random.randrange(first_long)


def long_texts(texts: Sequence[str], max_tokens: int, seed: int) -> list[str]:
    """Put texts together to long ones, a quarter up to the whole of what the encoder takes; some are cut there."""
    draw = random.Random(seed)
    made = []
    for _ in range(LONG_TEXTS):
        wanted = _CHARACTERS_A_TOKEN * draw.uniform(max_tokens / 4, max_tokens)
        parts: list[str] = []
        while sum(map(len, parts)) < wanted:
            parts.append(draw.choice(texts))
        made.append(" ".join(parts))
    return made


def expect(encoder: Encoder, bundle: Path, texts: Sequence[str], seed: int) -> Expected:
    """Give the bundle's canaries with the reference's vectors, and the workload's and long texts with the encoder's.

    Args:
        encoder: the bundle's, as it will serve.
        bundle: its folder.
        texts: the workload's.
        seed: of the long texts.

    Raises:
        BundleError: the canaries cannot be read.
        EngineError: the engine failed.
    """
    # The fake engine's vectors are no model's: the reference's are not what it gives.
    canaries = read_canaries(bundle) if encoder.artifact is not None else ()
    computed = [*texts, *long_texts(texts, encoder.spec.max_tokens, seed)]
    vectors = components(encoder.encode(computed), encoder.spec)
    references = np.array([canary.vector for canary in canaries], np.float32).reshape(-1, vectors.shape[1])
    return Expected(
        texts=(*(canary.text for canary in canaries), *computed),
        components=np.concatenate([references, vectors]),
        floor=EXACT_FLOOR if encoder.artifact is None else encoder.artifact.parity.floor,
        spec=encoder.spec,
        canaries=len(canaries),
        long_from=len(canaries) + len(texts),
    )
