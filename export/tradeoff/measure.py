"""Measure candidates beside the encoder: quality on texts that no candidate saw, and speed in interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluation.probes import Probe, evaluate_probes
from evaluation.retrieval import Retrieval, evaluate_retrieval
from evaluation.sets import EvaluationSet
from evaluation.similarity import score_pairs
from evaluation.statistics import Bootstrap, Estimate, Result, flat, gains
from evaluation.vectors import Encode, encode_distinct, top_overlap
from export.tradeoff.make import Made
from mirror_runtime.bundle import Layout, Precision, VectorType, read_manifest, sha256_texts
from mirror_runtime.encoder import Encoder
from mirror_runtime.vectors import components, cosines, dtype_of, width_of

ROUNDS = 5

ROUND_S = 0.3
"""Shortest measurement of one point in one round: the texts are encoded again and again until then."""

SINGLES = 24
"""Texts encoded one by one in each round, from the shortest to the longest."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to run one candidate."""

    made: Made
    precision: Precision
    dimensions: int | None = None  # to which vectors are cut; None for all

    @property
    def name(self) -> str:
        """The candidate, its precision and its cut."""
        cut = f", {self.dimensions} dims" if self.dimensions else ""
        return f"{self.made.candidate.name} {self.precision.value}{cut}"

    @property
    def engine_key(self) -> str:
        """What is loaded for it: points that differ by a cut share it, and its speed."""
        return replace(self, dimensions=None).name

    def load(self) -> Encoder:
        """Load its encoder, by the documented rule and not by a plan, so that nothing outside decides."""
        return Encoder.load(self.made.bundle, precision=self.precision.value, plan=None)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of `Tasks`, times 100, its 95 % interval, and beside the encoder's."""

    task: str
    set: str
    metric: str
    value: float
    value_low: float
    value_high: float
    samples: int
    gain: float  # over the encoder; the interval is paired
    gain_low: float
    gain_high: float
    share: float | None  # of the encoder's, in %


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a point's vectors are worth, beside the encoder's."""

    results: tuple[Figure, ...]
    top10: float  # share of each text's ten nearest that the encoder has too, times 100
    cosine: float | None  # mean, to the encoder's vectors; None where the widths differ
    certified: float  # worst cosine to this candidate's own PyTorch reference, from its certificate
    vector_bytes: int
    bundle_bytes: int


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What quality is measured on."""

    probes: tuple[Probe, ...]
    sample: tuple[str, ...]  # whose neighbours and vectors are compared with the encoder's
    sets: tuple[EvaluationSet, ...] = ()
    collections: tuple[Retrieval, ...] = ()

    @property
    def texts(self) -> list[str]:
        """Every text, with repeats."""
        lists = [texts for one in self.probes for texts in (one.questions, one.answers, one.decoys)]
        lists += [one.texts for one in self.sets]
        lists += [texts for one in self.collections for texts in (one.queries, one.documents)]
        return [text for texts in (*lists, self.sample) for text in texts]

    @property
    def digest(self) -> str:
        """A hash of all texts and judgements."""
        judged = [one.sha256 for one in self.sets] + [str(one.relevant) for one in self.collections]
        return sha256_texts([*(probe.name for probe in self.probes), *judged, *self.texts])

    def results(self, encode: Encode) -> list[Result]:
        """Measure an encoder."""
        bootstrap = Bootstrap()
        found = evaluate_probes(self.probes, encode, bootstrap)
        for one in self.sets:
            key = ("sts", one.name, "Spearman")
            found.append(score_pairs(one.first, one.second, one.scores, encode, bootstrap, key))
        for collection in self.collections:
            found += evaluate_retrieval(collection, encode, bootstrap)
        return found


class Judge:
    """Compares points with the encoder, whose vectors of all texts it holds."""

    def __init__(self, tasks: Tasks, encoder: Encoder) -> None:
        self._tasks = tasks
        lookup = _lookup(_vectors(encoder, tasks.texts))
        self._results, self._sample = tasks.results(lookup), lookup(tasks.sample)

    def judge(self, points: Sequence[Point], encoder: Encoder) -> list[Quality]:
        """Measure points that share an encoder, each with its cut: texts are encoded once."""
        spec = encoder.spec
        raw = _vectors(encoder, self._tasks.texts)
        size = sum(path.stat().st_size for path in points[0].made.bundle.rglob("*") if path.is_file())
        assert encoder.artifact is not None
        found = []
        for point in points:
            lookup = _lookup(raw, point.dimensions)
            cut = replace(spec, dim=point.dimensions or spec.dim, trained_dims=())
            results, sample = self._tasks.results(lookup), lookup(self._tasks.sample)
            same = spec.vector_type is not VectorType.BINARY and sample.shape == self._sample.shape
            found.append(
                Quality(
                    results=tuple(map(_beside, results, gains(self._results, results), self._results)),
                    top10=100 * top_overlap(sample, self._sample),
                    cosine=float(cosines(sample, self._sample).mean()) if same else None,
                    certified=encoder.artifact.parity.min_cosine,
                    vector_bytes=width_of(cut) * dtype_of(cut).itemsize,
                    bundle_bytes=size,
                )
            )
        return found


def points_of(made: Made) -> tuple[list[Point], list[Precision]]:
    """List the points of a candidate, cut and whole, and the precisions that its bundle lacks."""
    packed = {one.precision for one in read_manifest(made.bundle).artifacts if one.layout is Layout.PACKED}
    points = [
        Point(made=made, precision=precision, dimensions=dimensions)
        for precision in made.candidate.precisions
        if precision in packed
        for dimensions in (None, *made.candidate.dimensions)
    ]
    return points, [one for one in made.candidate.precisions if one not in packed]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The speed of an encoder, tokenising included."""

    rates: tuple[float, ...]  # texts a second in each round
    singles_ms: tuple[float, ...]  # of texts encoded alone, in all rounds

    @property
    def texts_per_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates)

    @property
    def p50_ms(self) -> float:
        """The median time of a text alone."""
        return statistics.median(self.singles_ms)

    def over(self, other: Speed) -> float:
        """Return the median over rounds of the ratio to another encoder's rate in the same round."""
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))


def measure_speeds(
    encoders: Mapping[str, Callable[[Sequence[str]], object]],
    texts: Sequence[str],
    on_round: Callable[[int], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Speed]:
    """Measure encoders in turns, round after round, so that a machine that slows down slows all of them.

    Args:
        encoders: by name.
        texts: distinct ones, since an encoder computes equal texts of a window once.
        on_round: called with the number of rounds done.
        clock: returns seconds.
    """
    evenly = np.linspace(0, len(texts) - 1, min(SINGLES, len(texts)))
    singles = [sorted(texts, key=len)[round(place)] for place in evenly]
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    alone: dict[str, list[float]] = {name: [] for name in encoders}
    for encode in encoders.values():  # shapes are compiled when they first occur
        encode(texts)
        for text in singles:
            encode([text])
    for done in range(ROUNDS):
        on_round(done)
        for name, encode in encoders.items():
            count, began = 0, clock()
            while (seconds := clock() - began) < ROUND_S:
                encode(texts)
                count += len(texts)
            rates[name].append(count / seconds)
            for text in singles:
                began = clock()
                encode([text])
                alone[name].append(1000 * (clock() - began))
    on_round(ROUNDS)
    return {name: Speed(rates=tuple(rates[name]), singles_ms=tuple(alone[name])) for name in encoders}


def _vectors(encoder: Encoder, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    return encode_distinct(lambda part: components(encoder.encode(part), encoder.spec), texts)


def _lookup(raw: Mapping[str, NDArray[np.float32]], dimensions: int | None = None) -> Encode:
    return lambda texts: np.stack([raw[text][:dimensions] for text in texts])


def _beside(result: Result, gain: Estimate, encoder: Result) -> Figure:
    share = 100 * result.figure.value / encoder.figure.value if encoder.figure.value > 0 else None
    return Figure(**result.to_json() | flat("gain", gain), share=share)
