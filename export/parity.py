"""The proof of an artifact: its vectors against PyTorch's, computed with the engine and options that will serve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.graphs import Graph
from mirror_runtime.bundle import TOKENIZER_FILE, EncoderSpec, EngineName, Parity, Precision, sha256_texts
from mirror_runtime.encoder import WINDOW
from mirror_runtime.engines import Engine, load_engine
from mirror_runtime.engines.onnxruntime_engine import open_session
from mirror_runtime.errors import InputError, ParityError
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import Ladder, PackedRows, pack
from mirror_runtime.tokens import LongTexts, Tokenizer
from training.reference import Reference

FLOORS = {Precision.FP32: 0.99999, Precision.BF16: 0.9995}
"""The smallest cosine to the reference that any text may have."""

NEIGHBOURS = 24
"""Texts that are also run alone."""

PADDED_BATCH = 32

Vectors = NDArray[np.float32]
Encode = Callable[[Sequence[str]], Vectors]
"""Texts to float32 [n, dim], in one ragged batch or several."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What artifacts are compared with.

    Attributes:
        texts: ragged real text.
        vectors: float32 [n, dim], the reference's.
        reference: what made them, such as "PyTorch 2.13.0 fp32".
        spec: the encoder's.
    """

    texts: tuple[str, ...]
    vectors: Vectors
    reference: str
    spec: EncoderSpec

    def __post_init__(self) -> None:
        check_finite(self.vectors, self.texts, f"the reference ({self.reference})")

    @classmethod
    def of(cls, reference: Reference, texts: Sequence[str]) -> Expected:
        """Encode texts with PyTorch.

        Raises:
            ParityError: a vector is not finite.
        """
        release = torch.__version__.split("+")[0]
        return cls(
            texts=tuple(texts),
            vectors=reference.encode(texts),
            reference=f"PyTorch {release} fp32",
            spec=reference.spec,
        )


def prove_padded(graph: Graph, expected: Expected) -> Parity:
    """Prove a padded graph on ONNX Runtime with the runtime's session options; see `prove`."""
    spec = expected.spec
    session = open_session(graph.path, threads=usable_cores())
    tokenizer = Tokenizer(graph.path.parents[1] / TOKENIZER_FILE, spec.max_tokens, LongTexts.TRUNCATE)
    encode = padded_encode(session, tokenizer, spec.dim)
    return prove(encode, expected, floor=FLOORS[Precision.FP32], what="onnxruntime fp32 padded")


def prove_packed(folder: Path, graph: Graph, engine: EngineName, precision: Precision, expected: Expected) -> Parity:
    """Prove a packed graph with one engine in one precision; see `prove`.

    Args:
        folder: the bundle in the making, which holds the tokenizer.
        graph: the packed graph.
        engine: what runs it.
        precision: what it runs in.
        expected: texts and reference vectors.
    """
    spec = expected.spec
    tokenizer = Tokenizer(folder / TOKENIZER_FILE, spec.max_tokens, LongTexts.TRUNCATE)
    loaded = load_engine(engine, precision, graph.path, dim=spec.dim)
    try:
        encode = packed_encode(loaded, tokenizer, spec.max_tokens, spec.dim)
        what = f"{engine.value} {precision.value} packed"
        return prove(encode, expected, floor=FLOORS[precision], what=what)
    finally:
        loaded.close()


def packed_encode(engine: Engine, tokenizer: Tokenizer, max_tokens: int, dim: int) -> Encode:
    """Encode through a packed engine, the way `Encoder` does: same tokenizer, windows, ladder and streams."""
    ladder = Ladder.up_to(max_tokens)

    def encode(texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), dim), np.float32)
        with ThreadPoolExecutor(engine.streams) as pool:
            for at in range(0, len(texts), WINDOW):
                window = tokenizer(texts[at : at + WINDOW])
                _refuse(window.errors, texts)
                batches = pack(window.ids, window.lengths, ladder, streams=engine.streams)
                rows: list[PackedRows] = [batch.rows for batch in batches]
                for batch, out in zip(batches, pool.map(engine.run, rows), strict=True):
                    vectors[at + batch.pieces] = out.reshape(-1, dim)[batch.slots]
        return vectors

    return encode


def padded_encode(session: Any, tokenizer: Tokenizer, dim: int) -> Encode:
    """Encode through a padded graph in ragged batches of `PADDED_BATCH`, in the order given.

    Args:
        session: an `onnxruntime.InferenceSession` of the padded graph.
        tokenizer: of the bundle.
        dim: length of a vector.
    """

    def encode(texts: Sequence[str]) -> Vectors:
        parts = [np.zeros((0, dim), np.float32)]
        for at in range(0, len(texts), PADDED_BATCH):
            window = tokenizer(texts[at : at + PADDED_BATCH])
            _refuse(window.errors, texts)
            lengths = window.lengths
            mask = np.arange(lengths.max())[None, :] < lengths[:, None]
            input_ids = np.zeros(mask.shape, np.int64)
            input_ids[mask] = window.ids
            feed = {
                "input_ids": input_ids,
                "attention_mask": mask.astype(np.int64),
                "token_type_ids": np.zeros_like(input_ids),
            }
            parts.append(session.run(["sentence_embedding"], feed)[0])
        vectors: Vectors = np.concatenate(parts)
        return vectors

    return encode


def prove(encode: Encode, expected: Expected, *, floor: float, what: str) -> Parity:
    """Compare an artifact's vectors with the reference's, and with its own when each text is alone.

    Args:
        encode: runs the artifact.
        expected: texts and reference vectors.
        floor: see `FLOORS`.
        what: names the artifact in messages.

    Raises:
        ParityError: a vector is not finite, is farther from the reference than the floor allows, or moves when other
            texts share its batch.
    """
    texts = expected.texts
    # Texts of like length next to each other keep padding, and so the time, small.
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    vectors = np.zeros_like(expected.vectors)
    vectors[order] = encode([texts[i] for i in order])
    check_finite(vectors, texts, what)
    _check_distance(vectors, expected.vectors, texts, floor, f"{what} differs from {expected.reference}")
    picked = [order[i * len(order) // NEIGHBOURS] for i in range(NEIGHBOURS)] if len(order) > NEIGHBOURS else order
    sample = [texts[i] for i in picked]
    together = encode(sample)
    alone = np.concatenate([encode([text]) for text in sample])
    check_finite(together, sample, what)
    check_finite(alone, sample, what)
    _check_distance(together, alone, sample, floor, f"{what}: vectors depend on the other texts of a batch")
    _check_distance(alone, expected.vectors[picked], sample, floor, f"{what}: texts alone differ from the reference")
    cosines = _cosines(vectors, expected.vectors)
    return Parity(
        reference=expected.reference,
        texts=len(expected.texts),
        texts_sha256=sha256_texts(expected.texts),
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        max_abs_diff=float(np.abs(vectors - expected.vectors).max()),
        floor=floor,
        neighbour_cosine=float(_cosines(together, alone).min()),
        spearman=_spearman(vectors, expected.vectors),
        top10_overlap=_top10_overlap(vectors, expected.vectors),
    )


def check_finite(vectors: Vectors, texts: Sequence[str], what: str) -> None:
    """Refuse NaN and infinity before anything is compared: comparisons with NaN are always false.

    Raises:
        ParityError: naming the first text with such a vector.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise ParityError(
            f"{what} gives NaN or infinity for {bad.size} of {len(texts)} texts, such as {_short(texts[bad[0]])}: "
            "check the weights"
        )


def _check_distance(found: Vectors, wanted: Vectors, texts: Sequence[str], floor: float, problem: str) -> None:
    """Hold vectors to a cosine floor and to their length.

    The cosine alone does not see a missing normalisation. The difference relative to the wanted vector's length does,
    and its bound sqrt(2 - 2 floor) says for unit vectors exactly what the floor says.
    """
    cosines = _cosines(found, wanted)
    scale = np.maximum(np.linalg.norm(wanted.astype(np.float64), axis=1), 1e-12)
    relative = np.linalg.norm(found.astype(np.float64) - wanted, axis=1) / scale
    bound = math.sqrt(2 - 2 * floor)
    bad = (cosines < floor) | (relative > bound)
    if not bad.any():
        return
    worst = np.argsort(-relative)[:3]
    named = "; ".join(
        f"{_short(texts[i])} cosine {cosines[i]:.6f}, off by {relative[i]:.2g} of its length" for i in worst
    )
    raise ParityError(
        f"{problem} for {int(bad.sum())} of {len(texts)} texts (cosine below {floor} or off by more than {bound:.2g} "
        f"of its length). Worst: {named}"
    )


def _cosines(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    left, right = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: NDArray[np.float64] = (left * right).sum(1) / np.maximum(norms, 1e-12)
    return cosines


def _spearman(found: Vectors, wanted: Vectors) -> float:
    """Rank correlation of the cosines of every pair of neighbours in a fixed random order of the texts."""
    order = np.random.default_rng(0).permutation(len(found))
    rounds = [np.roll(order, shift) for shift in range(1, min(len(order), 9))]
    pairs = [np.concatenate([_cosines(v[order], v[other]) for other in rounds]) for v in (found, wanted)]
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in pairs]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _top10_overlap(found: Vectors, wanted: Vectors) -> float:
    """Give the share of each text's ten nearest other texts that both sets of vectors agree on."""
    nearest = []
    for vectors in (found, wanted):
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        nearest.append(np.argsort(-cosines, axis=1, kind="stable")[:, : min(10, len(unit) - 1)])
    shared = [np.intersect1d(a, b).size / max(a.size, 1) for a, b in zip(*nearest, strict=True)]
    return float(np.mean(shared))


def _refuse(errors: Any, texts: Sequence[str]) -> None:
    if errors:
        first = min(errors)
        raise InputError(f"the parity texts hold one that cannot be encoded: {errors[first]}")


def _short(text: str, limit: int = 60) -> str:
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[:limit]}…' ({len(text)} characters)"
