"""The shapes that an engine is built for: a static profile for each packed shape, or buckets of padded lengths."""

from __future__ import annotations

from collections.abc import Sequence

from export.tensorrt.builder import Profile
from mirror_runtime.bundle import TOKENS_PER_SLOT, EncoderSpec, TensorSpec
from mirror_runtime.errors import EngineError
from mirror_runtime.packing import BLOCK, TOKEN_BUDGET, ShapeSet

PADDED_BATCH = (1, 8, 32)
"""Smallest, usual and largest number of texts in a batch of a padded engine."""

FIRST_BUCKET = 32
"""Longest text of the first padded profile, in tokens; it doubles from one profile to the next."""


def packed_shape_set(spec: EncoderSpec, budget: int = TOKEN_BUDGET) -> ShapeSet:
    """Return the shapes that the runtime packs this encoder's texts into, if no plan names others."""
    return ShapeSet.up_to(spec.pad_to or spec.max_tokens, budget=budget)


def packed_profiles(inputs: Sequence[TensorSpec], shape_set: ShapeSet) -> tuple[Profile, ...]:
    """Return a static profile (min = opt = max) for each shape that packing can produce."""
    return tuple({tensor.name: (shape, shape, shape) for tensor in inputs} for shape in shape_set.shapes())


def padded_profiles(inputs: Sequence[TensorSpec], max_tokens: int) -> tuple[Profile, ...]:
    """Return a profile for each bucket of lengths up to `max_tokens`; together they cover every length once.

    TensorRT chooses kernels for a bucket's longest length: clients that pad to it get the measured speed.
    """
    few, usual, many = PADDED_BATCH
    profiles: list[Profile] = []
    shortest, longest = 1, FIRST_BUCKET
    while shortest <= max_tokens:
        longest = min(longest, max_tokens)
        shapes = ((few, shortest), (usual, longest), (many, longest))
        profiles.append({tensor.name: shapes for tensor in inputs})
        shortest, longest = longest + 1, 2 * longest
    return tuple(profiles)


def check_profiles(profiles: Sequence[Profile], inputs: Sequence[TensorSpec], max_tokens: int) -> None:
    """Check the arithmetic of profiles.

    Raises:
        EngineError: a profile lacks an input, does not have 1 <= min <= opt <= max in every dimension, has different
            shapes for two inputs, or (packed) has a row without slots; or no profile covers `max_tokens`.
    """
    if not profiles:
        raise EngineError("an engine needs at least one profile")
    names = [tensor.name for tensor in inputs]
    for index, profile in enumerate(profiles):
        where = f"profile {index}"
        if sorted(profile) != sorted(names):
            raise EngineError(f"{where} has shapes for {', '.join(profile)}; the graph's inputs are {', '.join(names)}")
        if len(set(profile.values())) > 1:
            raise EngineError(f"{where} has different shapes for its inputs: {profile}")
        least, usual, most = next(iter(profile.values()))
        if not (len(least) == len(usual) == len(most) == 2):
            raise EngineError(f"{where} is {least}, {usual}, {most}: the inputs have 2 dimensions")
        if not all(1 <= a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
            raise EngineError(f"{where} is {least}, {usual}, {most}: 1 <= min <= opt <= max must hold")
        if "segment_ids" in names and (most[1] % BLOCK or least[1] < TOKENS_PER_SLOT):
            raise EngineError(f"{where} has rows of {most[1]} tokens: packed rows are multiples of {BLOCK}")
    longest = max(shapes[2][1] for profile in profiles for shapes in profile.values())
    if longest < max_tokens:
        raise EngineError(f"the longest profile covers {longest} tokens; the encoder accepts texts of {max_tokens}")
