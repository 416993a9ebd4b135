"""The certificate of an artifact: its vectors against PyTorch's, computed with the engine and options that serve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.reference import Reference, padded_batches
from evaluation.sets import EvaluationSet
from evaluation.statistics import spearman
from export.graph.trace import Graph
from export.proof.proof_texts import CANARIES
from mirror_runtime.bundle import (
    TOKENIZER_FILE,
    Artifact,
    EncoderSpec,
    EngineName,
    Layout,
    Manifest,
    Parity,
    Precision,
    StsScore,
    TensorSpec,
    VectorType,
    sha256_texts,
)
from mirror_runtime.cli.run import truncations_counted_elsewhere
from mirror_runtime.encoder import Encoder
from mirror_runtime.engines.onnxruntime_engine import open_session
from mirror_runtime.engines.openvino_engine import compile_padded
from mirror_runtime.engines.tensorrt_engine import LoadedPlan
from mirror_runtime.errors import EngineError, InputError, ParityError
from mirror_runtime.host import usable_cores
from mirror_runtime.tokenizer import LongTexts, Tokenizer
from mirror_runtime.vectors import components, cosines, distance_problem, quoted, unit_rows

FLOORS = {
    Precision.FP32: 0.99999,
    Precision.FP16: 0.9999,
    Precision.BF16: 0.9995,
    Precision.INT8: 0.98,
    Precision.FP8: 0.98,
}
"""The smallest cosine to the reference that any text may have."""

NEIGHBOUR_FLOOR = 0.999
"""The smallest cosine between a text's vector alone and among others, where the precision's own floor is lower."""

CHANCE_STEPS = 4
"""Components of an int8 vector that may be rounded the other way."""

CHANCE_OF_BITS = 1e-4
"""How often a binary vector at the largest angle that is allowed may have more flipped bits than its floor allows."""

STS_DROP = 0.5
"""Points of Spearman correlation that an artifact may lose on an evaluation set."""

NEIGHBOURS = 24
"""Texts that are also run alone, spread over the lengths that occur."""

PAIRS_A_TEXT = 8
"""Random other texts that each text's similarity is ranked with."""

NEAREST = 10

TIE = 1e-6
"""Cosines that differ by less are equal: float32 rounds them to that, and texts that differ in blanks tie exactly."""

Vectors = NDArray[np.float32]
Run = Callable[[Mapping[str, NDArray[np.int64]]], Vectors]
"""A padded graph's inputs to its text vectors."""

Encode = Callable[[Sequence[str]], Vectors]
"""Texts to the components of their vectors, float32 [n, dim], in one ragged batch or several."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A graph, an engine and a precision that are to be proven together.

    Attributes:
        path: the graph, relative to the bundle in the making.
        layout: padded or packed.
        engine: what runs it.
        precision: what it runs in.
        inputs: in the graph's order.
        outputs: in the graph's order.
    """

    path: str
    layout: Layout
    engine: EngineName
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, folder: Path, graph: Graph, engine: EngineName, precision: Precision) -> Candidate:
        """Name a graph that lies in a folder, the bundle or its making."""
        return cls(
            path=graph.path.absolute().relative_to(folder.absolute()).as_posix(),
            layout=graph.layout,
            engine=engine,
            precision=precision,
            inputs=graph.inputs,
            outputs=graph.outputs,
        )

    def certified(self, parity: Parity, *, path: str, size: int, toolchain: Mapping[str, str]) -> Artifact:
        """Give the manifest's entry.

        Args:
            parity: what was proven.
            path: where the graph is in the finished bundle.
            size: see `Artifact`.
            toolchain: see `Artifact`.
        """
        return Artifact(
            path=path,
            engine=self.engine,
            precision=self.precision,
            layout=self.layout,
            inputs=self.inputs,
            outputs=self.outputs,
            size=size,
            parity=parity,
            toolchain=toolchain,
        )

    def __str__(self) -> str:
        return f"{self.engine.value} {self.precision.value} {self.layout.value}"


@dataclass(frozen=True, kw_only=True)
class Floors:
    """The smallest cosines that any text may have, and all of them on average.

    Attributes:
        reference: to the reference's vector.
        neighbour: between its vector alone and its vector among others.
        mean: to the references' vectors, averaged over the texts; it exceeds `reference` where chance decides single
            texts.
    """

    reference: float
    neighbour: float
    mean: float

    @classmethod
    def of(cls, precision: Precision, spec: EncoderSpec) -> Floors:
        """Give the floors of a precision, for the vectors that an encoder gives.

        Bits are coarse: vectors at an angle of a have a share a / pi of different bits, on average, and one bit of 384
        is a cosine of 0.995 already. How many a single text flips is chance, and how many all of them do is not: the
        average is held to the precision's angle, each text to what is rare at that angle.
        """
        reference, neighbour = FLOORS[precision], max(FLOORS[precision], NEIGHBOUR_FLOOR)
        if spec.vector_type is VectorType.BINARY:
            mean = 1 - 2 * math.acos(reference) / math.pi
            reference, neighbour = (
                1 - (2 * _most_flips(math.acos(cosine) / math.pi, spec.dim) + 1) / spec.dim  # half a bit of room
                for cosine in (reference, neighbour)
            )
            return cls(reference=reference, neighbour=neighbour, mean=mean)
        if spec.int8_scale is not None and spec.normalize:
            reference, neighbour = (
                cosine - _rounding_loss(cosine, spec.dim, spec.int8_scale) for cosine in (reference, neighbour)
            )
        return cls(reference=reference, neighbour=neighbour, mean=reference)


def _most_flips(share: float, dim: int) -> int:
    """Give the bits of `dim` that flip, each with probability `share`, in all but `CHANCE_OF_BITS` of all vectors."""
    within = 0.0
    for flips in range(dim + 1):
        within += math.comb(dim, flips) * share**flips * (1 - share) ** (dim - flips)
        if within >= 1 - CHANCE_OF_BITS:
            return flips
    return dim


def _rounding_loss(cosine: float, dim: int, step: float) -> float:
    """Give what rounding to int8 may take from the cosine of two unit vectors besides what lies between them.

    A difference of d in a component becomes a whole step with probability d / step, which adds d step to the squared
    distance on average; over all components that is at most sqrt(dim) times their distance times the step.
    """
    return (step * math.sqrt(2 * (1 - cosine) * dim) + CHANCE_STEPS * step**2) / 2


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What artifacts are compared with.

    Attributes:
        texts: ragged real text.
        vectors: float32 [n, dim], the components of the reference's.
        reference: what made them, such as "PyTorch 2.13.0 fp32".
        sets: scored pairs to measure quality on.
        scores: the reference's Spearman correlation on each, in points.
    """

    texts: tuple[str, ...]
    vectors: Vectors
    reference: str
    sets: tuple[EvaluationSet, ...] = ()
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_finite(self.vectors, self.texts, f"the reference ({self.reference})")

    @classmethod
    def of(cls, reference: Reference, texts: Sequence[str], sets: Sequence[EvaluationSet] = ()) -> Expected:
        """Encode texts, the canaries and sets with PyTorch.

        The canaries too, since `mirror verify` holds them against the floors on other machines.

        Raises:
            ParityError: a vector is not finite.
        """
        release = torch.__version__.split("+")[0]
        proving = tuple(dict.fromkeys((*texts, *CANARIES)))
        return cls(
            texts=proving,
            vectors=reference.encode(proving),
            reference=f"PyTorch {release} fp32",
            sets=tuple(sets),
            scores=tuple(_quality(reference.encode, chosen) for chosen in sets),
        )


def prove_artifact(folder: Path, candidate: Candidate, manifest: Manifest, expected: Expected) -> Parity:
    """Prove a candidate with the runtime's own parts: see `prove`.

    Args:
        folder: the bundle in the making, which holds the tokenizer and the graph.
        candidate: what is to be proven.
        manifest: says what decides the vectors; its artifacts are not read.
        expected: texts and reference vectors.

    Raises:
        ParityError: the vectors are not the reference's.
        EngineError: the engine cannot run the graph.
    """
    spec = manifest.encoder
    floors = Floors.of(candidate.precision, spec)
    if candidate.layout is Layout.PACKED:
        with (
            truncations_counted_elsewhere(),  # the texts are too long on purpose
            Encoder.of_graph(folder, manifest, candidate.engine, candidate.precision, candidate.path) as encoder,
        ):
            prove_shapes(encoder, expected, floors, what=str(candidate))
            return prove(lambda texts: components(encoder.encode(texts), spec), expected, floors, what=str(candidate))
    with _padded_run(folder / candidate.path, candidate.engine, candidate.precision) as run:
        return prove(padded_encode(run, folder, candidate, spec), expected, floors, what=str(candidate))


def prove_shapes(encoder: Encoder, expected: Expected, floors: Floors, *, what: str) -> None:
    """Compare vectors from a full batch of every shape that `prove` leaves out with the reference's.

    Args:
        encoder: runs the artifact.
        expected: texts and reference vectors.
        floors: of its precision and vector type.
        what: names the artifact in messages.

    Raises:
        ParityError: a vector is not finite, or is farther from the reference than the floor allows.
        EngineError: the engine cannot run a shape.
    """
    for shape, held, vectors in encoder.encode_shapes(expected.texts):
        texts = [expected.texts[i] for i in held]
        rows = f"{what} in rows of {shape[0]} x {shape[1]} tokens"
        found = components(vectors, encoder.spec)
        check_finite(found, texts, rows)
        problem = f"{rows} differs from {expected.reference}"
        _check_distance(found, expected.vectors[held], texts, floors.reference, problem)


@contextmanager
def _padded_run(graph: Path, engine: EngineName, precision: Precision) -> Iterator[Run]:
    """Open a padded graph in the engine that serves it."""
    if engine is EngineName.TENSORRT:
        plan = LoadedPlan(graph, streams=1)
        try:
            yield lambda feed: plan.run(feed)["sentence_embedding"]
        finally:
            plan.close()
    elif engine is EngineName.ONNXRUNTIME:
        session = open_session(graph, threads=usable_cores())
        yield lambda feed: session.run(["sentence_embedding"], feed)[0]
    elif engine is EngineName.OPENVINO:
        compiled = compile_padded(graph, precision)
        yield lambda feed: compiled(feed)["sentence_embedding"]
    else:
        raise EngineError(f"padded graphs are not proven on {engine.value}: choose onnxruntime, openvino or tensorrt")


def padded_encode(run: Run, folder: Path, candidate: Candidate, spec: EncoderSpec) -> Encode:
    """Encode through a padded graph, texts of like length in one batch."""
    # Without `pad_to`: the graph itself pads where the pooling is defined by padding.
    tokenizer = Tokenizer(folder / TOKENIZER_FILE, spec.max_tokens, LongTexts.TRUNCATE, template=spec.template)

    def encode(texts: Sequence[str]) -> Vectors:
        tokenized = tokenizer(texts)
        if tokenized.errors:
            raise InputError(
                f"a text that is to prove the graphs cannot be encoded: {min(tokenized.errors.items())[1]}"
            )
        starts = np.cumsum(tokenized.lengths) - tokenized.lengths
        vectors = np.zeros((tokenized.lengths.size, spec.dim), np.float32)
        for batch in padded_batches(tokenized.lengths):
            mask = np.arange(tokenized.lengths[batch].max())[None, :] < tokenized.lengths[batch, None]
            input_ids = np.zeros(mask.shape, np.int64)
            input_ids[mask] = np.concatenate([tokenized.ids[starts[i] :][: tokenized.lengths[i]] for i in batch])
            feed = {
                "input_ids": input_ids,
                "attention_mask": mask.astype(np.int64),
                "token_type_ids": np.zeros_like(input_ids),
            }
            wanted = {tensor.name: feed[tensor.name] for tensor in candidate.inputs}
            vectors[batch] = components(run(wanted), spec)
        return vectors[tokenized.parts]  # each text is one part: too long ones are truncated

    return encode


def prove(encode: Encode, expected: Expected, floors: Floors, *, what: str) -> Parity:
    """Compare an artifact's vectors with the reference's, and with its own when each text is alone.

    Args:
        encode: runs the artifact.
        expected: texts and reference vectors.
        floors: of its precision and vector type.
        what: names the artifact in messages.

    Raises:
        ParityError: a vector is not finite, is farther from the reference than the floor allows, or moves when other
            texts share its batch; all of them are farther on average than theirs; or the artifact loses more than
            `STS_DROP` points on an evaluation set.
    """
    texts, floor = expected.texts, floors.reference
    vectors = encode(texts)
    check_finite(vectors, texts, what)
    _check_distance(vectors, expected.vectors, texts, floor, f"{what} differs from {expected.reference}")
    by_length = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    count = min(NEIGHBOURS, len(texts))
    picked = [by_length[i * len(texts) // count] for i in range(count)]
    sample = [texts[i] for i in picked]
    together = encode(sample)
    alone = np.concatenate([encode([text]) for text in sample])
    check_finite(together, sample, what)
    check_finite(alone, sample, what)
    _check_distance(together, alone, sample, floors.neighbour, f"{what}: vectors depend on the other texts of a batch")
    _check_distance(alone, expected.vectors[picked], sample, floor, f"{what}: texts alone differ from the reference")
    similar = cosines(vectors, expected.vectors)
    if similar.mean() < floors.mean:
        raise ParityError(
            f"{what} differs from {expected.reference}: its cosine over {len(texts)} texts is {similar.mean():.6f} on "
            f"average, below {floors.mean:.6f}"
        )
    return Parity(
        reference=expected.reference,
        texts=len(texts),
        texts_sha256=sha256_texts(texts),
        min_cosine=float(similar.min()),
        mean_cosine=float(similar.mean()),
        max_abs_diff=float(np.abs(vectors - expected.vectors).max()),
        floor=floor,
        neighbour_cosine=float(cosines(together, alone).min()),
        spearman=_rank_correlation(vectors, expected.vectors),
        top10_overlap=_top_overlap(vectors, expected.vectors),
        sts=_scores(encode, expected, what),
    )


def check_finite(vectors: Vectors, texts: Sequence[str], what: str) -> None:
    """Refuse NaN and infinity before anything is compared: comparisons with NaN are always false.

    Raises:
        ParityError: naming the first text with such a vector.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise ParityError(
            f"{what} gives NaN or infinity for {bad.size} of {len(texts)} texts, such as {quoted(texts[bad[0]])}: "
            "check the weights"
        )


def _check_distance(found: Vectors, wanted: Vectors, texts: Sequence[str], floor: float, problem: str) -> None:
    """Check vectors by `distance_problem`.

    Raises:
        ParityError: beginning with `problem`.
    """
    if named := distance_problem(found, wanted, floor, texts):
        raise ParityError(f"{problem} for {named}")


def _scores(encode: Encode, expected: Expected, what: str) -> tuple[StsScore, ...]:
    scores = []
    for chosen, before in zip(expected.sets, expected.scores, strict=True):
        after = _quality(encode, chosen)
        # Also true of NaN, which no comparison holds for.
        if not before - after <= STS_DROP:
            raise ParityError(
                f"{what}: {chosen.name} drops from {before:.2f} to {after:.2f} points, by more than {STS_DROP}"
            )
        scores.append(
            StsScore(name=chosen.name, pairs=len(chosen.scores), sha256=chosen.sha256, reference=before, artifact=after)
        )
    return tuple(scores)


def _quality(encode: Encode, chosen: EvaluationSet) -> float:
    """Give the Spearman correlation of the pairs' cosines with people's scores, in points."""
    texts = list(dict.fromkeys(chosen.texts))
    vectors = dict(zip(texts, encode(texts), strict=True))
    first, second = (np.array([vectors[text] for text in side]) for side in (chosen.first, chosen.second))
    return 100 * spearman(cosines(first, second), chosen.scores)


def _rank_correlation(found: Vectors, wanted: Vectors) -> float:
    """Give the rank correlation of the cosines of every text with some others, in a fixed random order.

    Similarities that are all equal have no order to lose: 1.
    """
    order = np.random.default_rng(0).permutation(len(found))
    others = [np.roll(order, shift) for shift in range(1, min(len(order) - 1, PAIRS_A_TEXT) + 1)]
    if not others:
        return 1.0
    a, b = (np.concatenate([cosines(v[order], v[other]) for other in others]) for v in (found, wanted))
    return 1.0 if np.ptp(b) == 0 else float(np.nan_to_num(spearman(a, b)))


def _top_overlap(found: Vectors, wanted: Vectors) -> float:
    """Give the share of each text's `NEAREST` other texts that are among the reference's, ties counted as shared."""
    count = min(NEAREST, len(found) - 1)
    if count < 1:
        return 1.0
    theirs, ours = _similarities(wanted), _similarities(found)
    last = np.partition(theirs, -count, axis=1)[:, -count]
    chosen = np.argpartition(ours, -count, axis=1)[:, -count:]
    return float((np.take_along_axis(theirs, chosen, axis=1) >= last[:, None] - TIE).mean())


def _similarities(vectors: Vectors) -> NDArray[np.float32]:
    """Give the cosines of every two texts, -2 of each with itself."""
    unit = unit_rows(vectors)
    similarities: NDArray[np.float32] = unit @ unit.T
    np.fill_diagonal(similarities, -2.0)
    return similarities
