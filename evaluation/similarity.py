"""What an encoder's vectors are worth: people's scores against cosines, and how the vectors lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.reference import Reference
from evaluation import geometry
from evaluation.sets import EvaluationSet
from evaluation.statistics import Estimate, estimate, resample_spearman, spearman
from mirror_runtime.bundle import EncoderSpec, VectorType
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.vectors import unit_rows

AGGREGATION = "all: a set's parts are put together and ranked at once; sets are averaged with equal weight"

CLOSE = 0.8
"""Alignment is over pairs scored at least this share of the set's highest score: 4 of 5 on STS."""

DECIMALS = 6
"""Cosines are rounded to these: the rest is fp32's rounding, and pairs of one text with itself must tie."""

TEXTS_A_CALL = 256
"""Texts between two reports of progress."""


class Group(str, Enum):
    """What is averaged together."""

    STS = "sts"
    WORDS = "words"


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """One set's figures.

    Attributes:
        name: of the set.
        group: what it is averaged with.
        sha256: of the set's file.
        pairs: that were scored.
        skipped: pairs without a score.
        spearman: rank correlation of cosine and score, times 100.
        alignment: mean squared distance of close pairs; None where a set has none.
        close_pairs: how many these are.
        uniformity: log E exp(-2 d²) over all texts of the set.
        anisotropy: mean cosine of two texts of the set.
        isotropy: IS, of unit vectors.
        mean_norm: MVN, before normalisation.
        resampled: float64 [resamples], the correlation of each bootstrap resample, times 100.
    """

    name: str
    group: Group
    sha256: str
    pairs: int
    skipped: int
    spearman: Estimate
    alignment: float | None
    close_pairs: int
    uniformity: float
    anisotropy: float
    isotropy: float
    mean_norm: float
    resampled: NDArray[np.float64] = dataclasses.field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Give everything but the resamples."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["resampled"]
        return values | {"group": self.group.value} | flat("spearman", self.spearman)


@dataclass(frozen=True, kw_only=True)
class Report:
    """An encoder's figures on all sets.

    Attributes:
        encoder: what it is called.
        spec: its head.
        results: in the order of the sets.
        seed: of the resamples.
    """

    encoder: str
    spec: EncoderSpec
    results: tuple[SetResult, ...]
    seed: int

    @property
    def means(self) -> dict[Group, Estimate]:
        """The plain mean of the sets' correlations, times 100, for each group that has sets."""
        return {
            group: estimate(
                float(np.mean([result.spearman.value for result in found])),
                np.mean([result.resampled for result in found], axis=0),
            )
            for group in Group
            if (found := [result for result in self.results if result.group is group])
        }

    def to_json(self) -> dict[str, Any]:
        """Give one JSON object: correlations times 100, 95 % intervals; `mean` is of all sets, `means` by group."""
        return {
            "encoder": self.encoder,
            "pooling": self.spec.pooling.value,
            "max_tokens": self.spec.max_tokens,
            "aggregation": AGGREGATION,
            "resamples": len(self.results[0].resampled),
            "seed": self.seed,
            "sets": [result.to_json() for result in self.results],
            "mean": float(np.mean([result.spearman.value for result in self.results])),
            "means": {group.value: flat("mean", value) for group, value in self.means.items()},
        }


def evaluate(
    reference: Reference,
    sets: Mapping[Group, Sequence[EvaluationSet]],
    *,
    name: str = "encoder",
    resamples: int = 1000,
    seed: int = 0,
    on_texts: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compare an encoder's cosines with people's scores.

    Vectors are fp32 and full: an encoder of int8 or binary vectors is measured before these are made.

    Args:
        reference: the encoder; it is not changed.
        sets: what to measure on, by what is averaged together.
        name: what the report calls the encoder.
        resamples: of the bootstrap. The same seed draws the same pairs for every encoder, so that differences of two
            reports on the same sets are paired.
        seed: of the bootstrap, and of the texts drawn where a set has too many for uniformity.
        on_texts: called with the number of texts encoded, and of all.

    Raises:
        InputError: there is no set, or cosines have no order because all are the same.
        BundleError: vectors are not finite.
    """
    chosen = [(group, one) for group, members in sets.items() for one in members]
    if not chosen:
        raise InputError("nothing to evaluate on: give --sts or --words files")
    raw = _encode_distinct(reference, [text for _, one in chosen for text in one.texts], name, on_texts)
    results = []
    for index, (group, one) in enumerate(chosen):
        rng = np.random.default_rng([seed, index])
        results.append(_measure(one, group, raw, resamples, rng))
    return Report(encoder=name, spec=reference.spec, results=tuple(results), seed=seed)


def flat(name: str, figure: Estimate) -> dict[str, float]:
    """Give an estimate as `NAME`, `NAME_low` and `NAME_high`."""
    return {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What changed between two encoders, times 100, with paired intervals.

    Attributes:
        sets: of each set's correlation, in the order of the sets.
        means: of each group's plain mean.
    """

    sets: tuple[Estimate, ...]
    means: dict[Group, Estimate]


def difference(before: Report, after: Report) -> Difference:
    """Subtract one report from another on the same sets.

    The intervals are over the same resamples on both sides, so they are narrower than those of either side.

    Raises:
        ValueError: the reports are of different sets or seeds.
    """
    if before.seed != after.seed or [r.sha256 for r in before.results] != [r.sha256 for r in after.results]:
        raise ValueError("the reports are of different sets or seeds")
    pairs = list(zip(before.results, after.results, strict=True))
    before_means = before.means
    means = {}
    for group, mean in after.means.items():
        drawn = np.mean([new.resampled - old.resampled for old, new in pairs if new.group is group], axis=0)
        means[group] = estimate(mean.value - before_means[group].value, drawn)
    return Difference(
        sets=tuple(
            estimate(new.spearman.value - old.spearman.value, new.resampled - old.resampled) for old, new in pairs
        ),
        means=means,
    )


def _encode_distinct(
    reference: Reference, texts: Sequence[str], name: str, on_texts: Callable[[int, int], None]
) -> dict[str, NDArray[np.float32]]:
    """Encode every distinct text once, before normalisation."""
    spec = dataclasses.replace(reference.spec, normalize=False, vector_type=VectorType.FLOAT32, int8_scale=None)
    plain = dataclasses.replace(reference, spec=spec)
    distinct = sorted(dict.fromkeys(texts), key=len)
    vectors: dict[str, NDArray[np.float32]] = {}
    on_texts(0, len(distinct))
    for start in range(0, len(distinct), TEXTS_A_CALL):
        part = distinct[start : start + TEXTS_A_CALL]
        vectors.update(zip(part, plain.encode(part), strict=True))
        on_texts(len(vectors), len(distinct))
    if not all(np.isfinite(vector).all() for vector in vectors.values()):
        raise BundleError(f"{name} gives vectors that are not finite: its weights are broken")
    return vectors


def _measure(
    one: EvaluationSet,
    group: Group,
    raw: Mapping[str, NDArray[np.float32]],
    resamples: int,
    rng: np.random.Generator,
) -> SetResult:
    rows = {text: i for i, text in enumerate(dict.fromkeys(one.texts))}
    vectors = np.stack([raw[text] for text in rows])
    units = unit_rows(vectors)
    first, second = (units[[rows[text] for text in side]] for side in (one.first, one.second))
    cosines = (first.astype(np.float64) * second).sum(axis=1).round(DECIMALS)
    value = spearman(cosines, one.scores)
    if np.isnan(value):
        raise InputError(f"every pair of {one.name} has the cosine {cosines[0]:.6f}: the encoder tells no texts apart")
    close = one.scores >= CLOSE * one.scores.max()
    resampled = 100 * resample_spearman(cosines, one.scores, resamples, rng)
    return SetResult(
        name=one.name,
        group=group,
        sha256=one.sha256,
        pairs=len(cosines),
        skipped=one.skipped,
        spearman=estimate(100 * value, resampled),
        alignment=geometry.alignment(first[close], second[close]) if close.any() else None,
        close_pairs=int(close.sum()),
        uniformity=geometry.uniformity(units, rng),
        anisotropy=geometry.anisotropy(units),
        isotropy=geometry.isotropy(units),
        mean_norm=geometry.mean_norm(vectors),
        resampled=resampled,
    )
