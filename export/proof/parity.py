"""Prove an artifact: compare its vectors, from the engine and options that serve, with PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.reference import Reference
from encoders.source import resolve
from evaluation.sets import EvaluationSet
from evaluation.statistics import spearman
from evaluation.vectors import top_overlap
from export.proof.candidate import Candidate, Encode, Vectors
from export.proof.floors import Floors
from export.proof.proof_texts import CANARIES, parity_texts
from mirror_runtime.bundle import Layout, Manifest, Parity, StsScore, sha256_texts
from mirror_runtime.canaries import mean_rows
from mirror_runtime.cli.run import truncations_counted_elsewhere
from mirror_runtime.encoder import Encoder
from mirror_runtime.errors import ParityError
from mirror_runtime.pairs import canary_items, items_for
from mirror_runtime.tokenizer import Item, characters
from mirror_runtime.vectors import agreement, components, cosines, distance_problem, quoted

STS_DROP = 0.5
"""Points of Spearman correlation that an artifact may lose on an evaluation set."""

INVARIANCE_TEXTS = 24
"""Texts that are also encoded one by one, spread over the lengths that occur."""

PAIRS_PER_TEXT = 8
"""Random other texts that each text's similarity is ranked with."""


NEIGHBOURS = 8192
"""Vectors among which the nearest ones are compared."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The reference vectors that artifacts are compared with."""

    texts: tuple[Item, ...]
    vectors: Vectors  # [n, dim], the components of the reference's vectors; for `tokens` of all tokens
    reference: str  # what computed them, such as "PyTorch 2.13.0 fp32"
    counts: NDArray[np.int64] | None = None  # [n], vectors of each text; None where each has one
    sets: tuple[EvaluationSet, ...] = ()
    scores: tuple[float, ...] = ()  # the reference's Spearman correlation on each set, in points

    def __post_init__(self) -> None:
        check_finite(self.vectors, self.labels, f"the reference ({self.reference})")

    @property
    def owners(self) -> NDArray[np.int64]:
        """Return the text of each vector."""
        return np.repeat(np.arange(len(self.texts)), 1 if self.counts is None else self.counts)

    @property
    def labels(self) -> Sequence[Item]:
        """Return the text of each vector, to quote."""
        return self.texts if self.counts is None else [self.texts[i] for i in self.owners]

    @property
    def means(self) -> Vectors:
        """Return one vector a text, [n, dim]: its own, or the mean of its tokens'."""
        return self.vectors if self.counts is None else mean_rows(self.vectors, self.counts)

    @classmethod
    def of(
        cls, reference: Reference, texts: Sequence[str] | None = None, sets: Sequence[EvaluationSet] = ()
    ) -> Expected:
        """Encode texts, the canaries and sets with PyTorch.

        The canaries are included because `mirror verify` holds them to the floors on other machines.
        """
        release = torch.__version__.split("+")[0]
        spec = reference.spec
        proving = tuple(
            dict.fromkeys((*items_for(spec, tuple(texts or parity_texts())), *canary_items(spec, CANARIES)))
        )
        return cls(
            texts=proving,
            vectors=reference.encode(proving),
            counts=reference.vector_counts(proving) if spec.per_token else None,
            reference=f"PyTorch {release} fp32",
            sets=tuple(sets),
            scores=tuple(_quality(reference.encode, chosen, pairs=spec.scores_pairs) for chosen in sets),
        )

    @classmethod
    def of_bundle(
        cls, bundle: Path, texts: Sequence[str] | None = None, sets: Sequence[EvaluationSet] = ()
    ) -> Expected:
        """Encode with the encoder that a bundle contains: see `of`."""
        return cls.of(Reference.load(resolve(str(bundle), text_vectors=False)), texts, sets)


def prove_artifact(folder: Path, candidate: Candidate, manifest: Manifest, expected: Expected) -> Parity:
    """Prove a candidate with the runtime's own parts and the unfinished bundle's tokenizer: see `prove`.

    Raises:
        ParityError: the vectors are not the reference's.
        EngineError: the engine cannot run the graph.
    """
    what, floors = str(candidate), Floors.of(candidate.precision, manifest.encoder)
    with opened(folder, candidate, manifest) as (encode, encoder):
        if encoder is not None:
            prove_shapes(encoder, expected, floors, what=what)
        return prove(encode, expected, floors, what=what)


@contextmanager
def opened(folder: Path, candidate: Candidate, manifest: Manifest) -> Iterator[tuple[Encode, Encoder | None]]:
    """Open a candidate as it will serve; with the runtime's encoder, which runs packed graphs only.

    Raises:
        EngineError: the engine cannot run the graph.
    """
    spec = manifest.encoder
    if candidate.graph.layout is Layout.PADDED:
        with candidate.padded_encode(folder, spec) as encode:
            yield encode, None
        return
    path = str(candidate.graph.path.absolute())
    with (
        truncations_counted_elsewhere(),  # the texts are too long on purpose
        Encoder.of_graph(folder, manifest, candidate.engine, candidate.precision, path) as encoder,
    ):
        yield lambda texts: components(encoder.encode_detailed(texts).vectors_or_raise(), spec), encoder


def prove_shapes(encoder: Encoder, expected: Expected, floors: Floors, *, what: str) -> None:
    """Compare the vectors of a full batch of every shape that `prove` does not reach with the reference's.

    Raises:
        ParityError: a vector is not finite, or its distance to the reference exceeds the floor.
        EngineError: the engine cannot run a shape.
    """
    labels = expected.labels
    for shape, indices, vectors in encoder.encode_shapes(expected.texts):
        texts = [labels[i] for i in indices]
        rows = f"{what} in rows of {shape[0]} x {shape[1]} tokens"
        found = components(vectors, encoder.spec)
        check_finite(found, texts, rows)
        problem = f"{rows} differs from {expected.reference}"
        _check_distance(found, expected.vectors[indices], texts, floors.reference, problem)


def prove(encode: Encode, expected: Expected, floors: Floors, *, what: str) -> Parity:
    """Compare an artifact's vectors with the reference's, and check that they do not depend on the batch.

    Raises:
        ParityError: a vector is not finite, its distance to the reference exceeds the floor, or it changes when other
            texts share its batch; the average distance exceeds its floor; or the artifact loses more than `STS_DROP`
            points on an evaluation set.
    """
    texts, labels, floor = expected.texts, expected.labels, floors.reference
    vectors = encode(texts)
    if vectors.shape != expected.vectors.shape:
        raise ParityError(
            f"{what} computes vectors of shape {vectors.shape} where {expected.reference} computes "
            f"{expected.vectors.shape}"
        )
    check_finite(vectors, labels, what)
    _check_distance(vectors, expected.vectors, labels, floor, f"{what} differs from {expected.reference}")
    by_length = sorted(range(len(texts)), key=lambda i: (characters(texts[i]), i))
    count = min(INVARIANCE_TEXTS, len(texts))
    picked = sorted(by_length[i * len(texts) // count] for i in range(count))
    rows = np.flatnonzero(np.isin(expected.owners, picked))  # of their vectors
    sample, quotes = [texts[i] for i in picked], [labels[i] for i in rows]
    together = encode(sample)
    one_by_one = np.concatenate([encode([text]) for text in sample])
    check_finite(together, quotes, what)
    check_finite(one_by_one, quotes, what)
    problem = f"{what}: vectors depend on the other texts of a batch"
    _check_distance(together, one_by_one, quotes, floors.batch_invariance, problem)
    problem = f"{what}: texts encoded one by one differ from {expected.reference}"
    _check_distance(one_by_one, expected.vectors[rows], quotes, floor, problem)
    similar = agreement(vectors, expected.vectors)
    if similar.mean() < floors.mean:
        raise ParityError(
            f"{what} differs from {expected.reference}: its cosine over {len(texts)} texts is {similar.mean():.6f} on "
            f"average, below {floors.mean:.6f}"
        )
    return Parity(
        reference=expected.reference,
        texts=len(texts),
        texts_sha256=sha256_texts(text if isinstance(text, str) else "\n".join(text) for text in texts),
        min_cosine=float(similar.min()),
        mean_cosine=float(similar.mean()),
        max_abs_diff=float(np.abs(vectors - expected.vectors).max()),
        floor=floor,
        neighbour_cosine=float(agreement(together, one_by_one).min()),
        spearman=_rank_correlation(vectors, expected.vectors),
        top10_overlap=top_overlap(vectors[:: _every(vectors)], expected.vectors[:: _every(vectors)]),
        sts=_scores(encode, expected, what),
    )


def check_finite(vectors: Vectors, texts: Sequence[Item], what: str) -> None:
    """Raise a ParityError for NaN and infinity before anything is compared: comparisons with NaN are always false."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise ParityError(
            f"{what} returns NaN or infinity for {bad.size} of {len(texts)} texts, such as {quoted(texts[bad[0]])}: "
            "check the weights"
        )


def _check_distance(found: Vectors, target: Vectors, texts: Sequence[Item], floor: float, problem: str) -> None:
    """Raise a ParityError that begins with `problem` if `distance_problem` finds one."""
    if named := distance_problem(found, target, floor, texts):
        raise ParityError(f"{problem} for {named}")


def _scores(encode: Encode, expected: Expected, what: str) -> tuple[StsScore, ...]:
    """Measure quality on the evaluation sets, and check that it does not drop by more than `STS_DROP`."""
    scores = []
    for chosen, before in zip(expected.sets, expected.scores, strict=True):
        after = _quality(encode, chosen, pairs=expected.vectors.shape[1] == 1)
        # The negation is also true for NaN.
        if not before - after <= STS_DROP:
            raise ParityError(
                f"{what}: {chosen.name} drops from {before:.2f} to {after:.2f} points, by more than {STS_DROP}"
            )
        scores.append(
            StsScore(name=chosen.name, pairs=len(chosen.scores), sha256=chosen.sha256, reference=before, artifact=after)
        )
    return tuple(scores)


def _quality(encode: Encode, chosen: EvaluationSet, *, pairs: bool = False) -> float:
    """Return the Spearman correlation of the pairs' cosines, or a reranker's scores, with human scores, in points."""
    if pairs:
        return 100 * spearman(encode(list(zip(chosen.first, chosen.second, strict=True)))[:, 0], chosen.scores)
    texts = list(dict.fromkeys(chosen.texts))
    vectors = dict(zip(texts, encode(texts), strict=True))
    first, second = (np.array([vectors[text] for text in side]) for side in (chosen.first, chosen.second))
    return 100 * spearman(cosines(first, second), chosen.scores)


def _every(vectors: Vectors) -> int:
    """Return the step that takes at most `NEIGHBOURS` of some vectors: all similarities of 17,000 take 1.2 GB."""
    return -(-len(vectors) // NEIGHBOURS)


def _rank_correlation(found: Vectors, target: Vectors) -> float:
    """Return the rank correlation of the cosines between every text and some others, in a fixed random order.

    Of a reranker it is that of the scores. It is 1 where all similarities are equal: they have no order to lose.
    """
    if found.shape[1] == 1:
        return float(np.nan_to_num(spearman(found[:, 0], target[:, 0])))
    order = np.random.default_rng(0).permutation(len(found))
    others = [np.roll(order, shift) for shift in range(1, min(len(order) - 1, PAIRS_PER_TEXT) + 1)]
    if not others:
        return 1.0
    a, b = (np.concatenate([cosines(v[order], v[other]) for other in others]) for v in (found, target))
    return 1.0 if np.ptp(b) == 0 else float(np.nan_to_num(spearman(a, b)))
