"""Evaluate an encoder: rank correlation of cosines with human scores, geometry of vectors, and any further tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation import geometry
from evaluation.sets import EvaluationSet
from evaluation.statistics import Bootstrap, Estimate, Result, estimate, flat, gains, resample_spearman, spearman
from evaluation.vectors import Encode, encode_distinct, pair_cosines, unit_vectors
from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.errors import InputError
from mirror_runtime.vectors import unit_rows

AGGREGATION = "all: a set's parts are put together and ranked at once; sets are averaged with equal weight"

GEOMETRY = ("alignment", "uniformity", "anisotropy", "IS", "MVN", "rank", "hubness")
"""Names of `SetResult.geometry`'s values. Lower is better, except for IS and rank."""

CLOSE = 0.8
"""Alignment is over pairs scored at least this share of the set's highest score: 4 of 5 on STS."""

DEFAULT_BOOTSTRAP = Bootstrap()

Task = Callable[[Encode, Bootstrap], list[Result]]
"""Anything else that is measured on an encoder."""


class Group(str, Enum):
    """Sets that are averaged together."""

    STS = "sts"
    WORDS = "words"
    PHRASES = "phrases"


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """Measures on one set."""

    name: str
    group: Group
    sha256: str  # of the set's file
    pairs: int
    skipped: int
    spearman: Estimate  # rank correlation of cosine and score, times 100
    alignment: float | None  # mean squared distance of close pairs; None if the set has none
    close_pairs: int
    uniformity: float  # log E exp(-2 d²) over all texts of the set
    anisotropy: float  # mean cosine of two texts of the set
    isotropy: float  # IS of unit vectors
    mean_norm: float  # MVN, before normalisation
    effective_rank: float  # of unit vectors, at most dim
    hubness: float  # skewness of how often a text is among others' nearest
    # float64 [resamples], the correlation of each bootstrap resample, times 100
    resampled: NDArray[np.float64] = dataclasses.field(repr=False, compare=False)

    @property
    def geometry(self) -> tuple[float | None, ...]:
        """The values of `GEOMETRY`."""
        head = (self.alignment, self.uniformity, self.anisotropy, self.isotropy, self.mean_norm)
        return *head, self.effective_rank, self.hubness

    def to_json(self) -> dict[str, Any]:
        """Return all fields except the resamples as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["resampled"]
        return values | {"group": self.group.value} | flat("spearman", self.spearman)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Measures of an encoder on all sets."""

    encoder: str
    spec: EncoderSpec | None  # None for an endpoint, which does not say
    results: tuple[SetResult, ...]  # in the order of the sets
    tasks: tuple[Result, ...] = ()  # of all other tasks
    bootstrap: Bootstrap

    @property
    def label(self) -> str:
        """The encoder's name, with its pooling where that is known."""
        return f"{self.encoder} ({self.spec.pooling.value})" if self.spec else self.encoder

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
        """Return one JSON object: figures times 100, 95 % intervals; `mean` of all sets and `means` by group."""
        values = [result.spearman.value for result in self.results]
        return {
            "encoder": self.encoder,
            "pooling": self.spec.pooling.value if self.spec else None,
            "max_tokens": self.spec.max_tokens if self.spec else None,
            "aggregation": AGGREGATION,
            "resamples": self.bootstrap.resamples,
            "seed": self.bootstrap.seed,
            "sets": [result.to_json() for result in self.results],
            "mean": float(np.mean(values)) if values else None,
            "means": {group.value: flat("mean", value) for group, value in self.means.items()},
            "tasks": [result.to_json() for result in self.tasks],
        }


def evaluate(
    encode: Encode,
    sets: Mapping[Group, Sequence[EvaluationSet]],
    *,
    spec: EncoderSpec | None,
    tasks: Sequence[Task] = (),
    name: str = "encoder",
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compare an encoder's cosines with human scores, and run further tasks.

    Args:
        encode: the encoder, before normalisation and rounding to a vector type.
        sets: by group.
        spec: of the encoder, for the report.
        tasks: functions of encoder and bootstrap.
        name: of the encoder, for the report.
        bootstrap: its seed draws the same pairs for every encoder, so that differences of two reports on the same sets
            are paired; it also draws texts if a set has too many for uniformity.
        on_progress: called with the number of the sets' encoded texts and of all.

    Raises:
        InputError: all cosines of a set are equal.
        BundleError: see `encode_distinct`.
    """
    chosen = [(group, one) for group, members in sets.items() for one in members]
    raw = encode_distinct(encode, [text for _, one in chosen for text in one.texts], name, on_progress)
    results = []
    for index, (group, one) in enumerate(chosen):
        rng = np.random.default_rng([bootstrap.seed, index])
        results.append(_measure(one, group, raw, bootstrap.resamples, rng))
    measured = tuple(result for task in tasks for result in task(encode, bootstrap))
    return Report(encoder=name, spec=spec, results=tuple(results), tasks=measured, bootstrap=bootstrap)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Differences of two encoders, times 100, with paired intervals."""

    sets: tuple[Estimate, ...]  # of each set's correlation, in the order of the sets
    means: dict[Group, Estimate]  # of each group's plain mean
    tasks: tuple[Estimate, ...]  # of each other task's figure


def difference(before: Report, after: Report) -> Difference:
    """Subtract one report from another on the same sets.

    Both sides use the same resamples, so the intervals are narrower than those of either side.

    Raises:
        ValueError: the reports have different sets or seeds.
    """
    if before.bootstrap != after.bootstrap or [r.sha256 for r in before.results] != [r.sha256 for r in after.results]:
        raise ValueError("the reports have different sets or seeds")
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
        tasks=tuple(gains(before.tasks, after.tasks)),
    )


def score_pairs(
    first: Sequence[str],
    second: Sequence[str],
    scores: ArrayLike,
    encode: Encode,
    bootstrap: Bootstrap,
    key: tuple[str, str, str],
) -> Result:
    """Return the rank correlation of cosine and score, times 100, as the result of (task, set, metric).

    Raises:
        InputError: all scores or all cosines are equal.
    """
    left, right = unit_vectors(encode, first, second)
    cosines = pair_cosines(left, right)
    value = spearman(cosines, scores)
    if np.isnan(value):
        raise InputError(f"all pairs of {key[1]} have one score, or one cosine")
    drawn = 100 * resample_spearman(cosines, scores, bootstrap.resamples, bootstrap.rng())
    return bootstrap.result(*key, 100 * value, drawn, len(cosines))


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
    cosines = pair_cosines(first, second)
    value = spearman(cosines, one.scores)
    if np.isnan(value):
        raise InputError(
            f"every pair of {one.name} has the cosine {cosines[0]:.6f}: the encoder does not distinguish texts"
        )

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
        effective_rank=geometry.effective_rank(units),
        hubness=geometry.hubness(units, rng),
        resampled=resampled,
    )
