"""What the load generator sends: texts in turn, or a mix of good, bad and cancelled requests with known answers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec, read_canaries
from mirror_runtime.encoder import Encoder
from mirror_runtime.vectors import Vectors, components, distance_problem

GRPC, HTTP, GATEWAY = "grpc", "http", "gateway"
"""Names of the targets: Triton's two protocols, and the gateway's own API."""

TEXTS_PER_REQUEST = {1: 0.80, 8: 0.15, 32: 0.05}
"""Sizes of the mix's requests, and how often each is drawn."""

TEXTS_A_LONG_ONE = 20
"""Of the workload, for each long text: so one in twenty of the mix's texts is long."""

FAKE_FLOOR = 0.99999
"""Cosine floor of the fake engine, which has no certificate: its vectors are a fixed function of the text."""

_CHARACTERS_PER_TOKEN = 5
"""Generous for English, so that some long texts exceed the encoder's limit and are truncated."""


class Kind(str, Enum):
    """Why a request is sent."""

    GOOD = "good"
    BAD = "bad"
    """Its last text is not UTF-8."""
    CANCELLED = "cancelled"
    """A good request of the largest size that its caller cancels."""


KINDS = {Kind.GOOD: 0.95, Kind.BAD: 0.03, Kind.CANCELLED: 0.02}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to a target by its name, with the positions of its texts."""

    kind: Kind = Kind.GOOD
    target: str
    chosen: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ExpectedVectors:
    """Texts and their right vectors.

    Attributes:
        texts: canaries, the workload's texts, then long ones.
        components: float32 [texts, dim], components of the right vectors.
        floor: cosine below which a vector is wrong.
        fingerprint: vector space that answers must name.
    """

    texts: tuple[str, ...]
    components: NDArray[np.float32]
    floor: float
    spec: EncoderSpec
    fingerprint: str

    def problem(self, chosen: Sequence[int], vectors: Vectors) -> str:
        """Describe what is wrong with an answer, see `distance_problem`; "" if it is right."""
        expected, found = self.components[list(chosen)], components(vectors, self.spec)
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
            fingerprint=encoder.fingerprint,
        )


def in_turn(target: str, size: int, texts: int, start: float = 0.0) -> Iterator[Request]:
    """Go round `texts` texts in requests of one size, from a share of a round on; what its end leaves is left out."""
    places = range(0, max(1, texts - size + 1), size)
    requests = [Request(target=target, chosen=tuple(range(at, min(at + size, texts)))) for at in places]
    first = int(start * len(requests))
    return itertools.cycle(requests[first:] + requests[:first])


def mix(expected: ExpectedVectors, seed: int, kinds: Mapping[Kind, float]) -> Iterator[Request]:
    """Draw requests over both of Triton's protocols, their kinds in these shares. The same seed draws the same ones."""
    draw = random.Random(seed)
    while True:
        (kind,) = draw.choices(tuple(kinds), tuple(kinds.values()))
        (size,) = draw.choices(tuple(TEXTS_PER_REQUEST), tuple(TEXTS_PER_REQUEST.values()))
        size = max(TEXTS_PER_REQUEST) if kind is Kind.CANCELLED else size
        target = draw.choice((GRPC, HTTP))
        yield Request(kind=kind, target=target, chosen=tuple(draw.choices(range(len(expected.texts)), k=size)))


def long_texts(texts: Sequence[str], max_tokens: int, seed: int) -> list[str]:
    """Join texts into long ones of a quarter of the encoder's limit up to somewhat more than the limit."""
    draw = random.Random(seed)
    joined = []
    for _ in range(1 + len(texts) // TEXTS_A_LONG_ONE):
        characters = _CHARACTERS_PER_TOKEN * draw.uniform(max_tokens / 4, max_tokens)
        parts: list[str] = []
        while sum(map(len, parts)) < characters:
            parts.append(draw.choice(texts))
        joined.append(" ".join(parts))
    return joined
