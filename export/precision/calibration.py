"""Record the activations that a packed graph's linear layers read on real text, as the basis of int8 and fp8 scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from export.graph.rewrite import Rewrite
from export.proof.proof_texts import parity_texts
from mirror_runtime.bundle import TOKENIZER_FILE, EncoderSpec
from mirror_runtime.errors import InputError
from mirror_runtime.packing import ShapeSet, pack
from mirror_runtime.stdlib_texts import standard_library
from mirror_runtime.tokenizer import LongTexts, Tokenizer
from mirror_runtime.vectors import components, cosines

TOKENS = 10_000
"""Tokens to calibrate on: more did not change the vectors of MiniLM."""

SAMPLED_TOKENS = 256
"""Tokens whose activations are kept for each layer, to try scales on."""

DEGENERATE = (
    "",
    "?",
    "...",
    "a",
    "hello",
    "3.14 2.71 1,000,000",
    "🎈 🎈🎈",
    "a b c d e f g h i j k l m n o p",
    "wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww",
    "https://example.org/a/b?c=d&e=%20f#g",
    "Ελληνικά, українська, ไทย, हिन्दी",
    "[SEP] [MASK] [UNK] [CLS] [PAD]",
    "</s> <s> <mask> <pad> <unk>",
    "<s> one </s>",
    "same " * 600,
    ", " * 300,
)
"""Texts that are not language: their tokens cause the largest activations, and scales must reach them."""

_REARRANGING = frozenset({"Reshape", "Transpose", "Slice", "Gather", "Squeeze", "Unsqueeze", "Identity"})

Vectors = NDArray[np.float32]


class Origin(Enum):
    """The operator that computed a value; decides how far other texts may exceed its range in calibration."""

    NORM = "norm"
    ATTENTION = "attention"
    ACTIVATION = "activation"


@dataclass(frozen=True, kw_only=True)
class ActivationStats:
    """Statistics of a value that one or several linear layers read."""

    peak: Vectors  # [channels], the largest magnitude of each channel
    rows: Vectors  # [n, channels], the value at n sampled tokens
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Packed batches of the calibration texts, the fp32 graph's vectors, and statistics of its activations."""

    spec: EncoderSpec
    feeds: tuple[Mapping[str, NDArray[np.int64]], ...]
    slots: tuple[NDArray[np.int64], ...]  # for each batch, the positions of the texts' vectors in the flattened output
    vectors: Vectors  # [n, dim], batch by batch
    activations: tuple[ActivationStats, ...]  # in the order of the graph's `linear_inputs`

    @classmethod
    def run(cls, graph: Path, bundle: Path, spec: EncoderSpec, texts: Sequence[str] | None = None) -> Calibration:
        """Run the fp32 packed graph over texts, by default `calibration_texts`; `bundle` holds the tokenizer.

        Raises:
            InputError: the texts have no tokens, or cannot be encoded.
        """
        feeds, slots = _batches(bundle, spec, texts)
        rewrite = Rewrite(graph)
        names = list(linear_inputs(rewrite))
        session = rewrite.session(extra_outputs=names)
        draw = np.random.default_rng(0)
        peaks: list[list[Vectors]] = [[] for _ in names]
        rows: list[list[Vectors]] = [[] for _ in names]
        vectors = []
        share = SAMPLED_TOKENS / sum(int((feed["segment_ids"] > 0).sum()) for feed in feeds)
        for feed, text_slots in zip(feeds, slots, strict=True):
            tokens = np.flatnonzero(feed["segment_ids"].reshape(-1))
            embedding, *values = session.run([rewrite.outputs[0], *names], feed)
            vectors.append(_vectors(embedding, text_slots, spec))
            for i, value in enumerate(values):
                flat = value.reshape(-1, value.shape[-1])
                # The last layer may compute only one token of each text, in the text's slot.
                used = flat[tokens if len(flat) == feed["segment_ids"].size else text_slots]
                peaks[i].append(np.abs(used).max(0))
                rows[i].append(used[draw.random(len(used)) < share])
        activations = (
            ActivationStats(peak=np.max(p, axis=0), rows=np.concatenate(r), origin=_origin(rewrite, name))
            for name, p, r in zip(names, peaks, rows, strict=True)
        )
        return cls(spec=spec, feeds=feeds, slots=slots, vectors=np.concatenate(vectors), activations=tuple(activations))

    def cosines(
        self, session: Any, batches: Sequence[int] | None = None, extra: Mapping[str, NDArray[np.bool_]] | None = None
    ) -> NDArray[np.float32]:
        """Return the cosine of each text's vector in a rewritten graph with the fp32 graph's, batch by batch.

        `extra` are inputs in addition to the packed graph's own.
        """
        chosen = range(len(self.feeds)) if batches is None else batches
        ends = np.cumsum([len(slots) for slots in self.slots])
        found = [
            _vectors(session.run(None, {**self.feeds[i], **(extra or {})})[0], self.slots[i], self.spec) for i in chosen
        ]
        left = np.concatenate(found)
        right = np.concatenate([self.vectors[ends[i] - len(self.slots[i]) : ends[i]] for i in chosen])
        return cosines(left, right, np.float32)


def linear_inputs(graph: Rewrite) -> dict[str, list[NodeProto]]:
    """Return the values that the transformer's linear layers read, each with its matrix products, in graph order.

    A linear layer is a product of a computed value and a matrix of weights. Those of the head are left out.
    """
    backbone = graph.backbone()
    found: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        weight = graph.constant(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and len(weight.dims) == 2 and node.output[0] in backbone:
            found.setdefault(node.input[0], []).append(node)
    return found


def _origin(graph: Rewrite, name: str) -> Origin:
    """Find the operator that computed a value, behind those that only rearrange it."""
    producers = {out: node for node in graph.nodes for out in node.output}
    while (node := producers.get(name)) is not None and node.op_type in _REARRANGING:
        name = node.input[0]
    # An RMSNorm ends with the product with its weights.
    weighted = node is not None and node.op_type == "Mul" and any(map(graph.is_vector, node.input))
    if weighted or (node is not None and node.op_type == "LayerNormalization"):
        return Origin.NORM
    is_attention = node is not None and node.op_type == "MatMul" and not any(map(graph.constant, node.input))
    return Origin.ATTENTION if is_attention else Origin.ACTIVATION


def calibration_texts() -> Iterator[str]:
    """Yield texts that are not language, then docstrings of this Python's standard library that prove no artifact."""
    yield from DEGENERATE
    proving = set(parity_texts())
    others = [item.text for item in standard_library() if item.text not in proving and len(item.text) <= 2000]
    order = np.random.default_rng(0).permutation(len(others))
    for i in order:
        yield others[i]


def _batches(
    bundle: Path, spec: EncoderSpec, texts: Sequence[str] | None
) -> tuple[tuple[Mapping[str, NDArray[np.int64]], ...], tuple[NDArray[np.int64], ...]]:
    tokenizer = Tokenizer(
        bundle / TOKENIZER_FILE, spec.max_tokens, LongTexts.TRUNCATE, template=spec.template, pad_to=spec.pad_to
    )
    chosen: list[str] = []
    tokens = 0
    for text in calibration_texts() if texts is None else texts:
        if tokens >= TOKENS:
            break
        chosen.append(text)
        tokens += min(spec.max_tokens, len(text) // 4 + 2)  # an estimate: the exact count does not matter
    window = tokenizer(chosen)
    if not window.lengths.size or window.errors:
        raise InputError(
            "the calibration texts cannot be encoded: pass --calibration a file of real text, one per line"
        )
    batches = pack(window.ids, window.lengths, ShapeSet.up_to(spec.max_tokens))
    feeds = tuple(
        {name: getattr(batch.rows, name) for name in ("input_ids", "position_ids", "segment_ids")} for batch in batches
    )
    return feeds, tuple(batch.slots for batch in batches)


def _vectors(embedding: NDArray[Any], slots: NDArray[np.int64], spec: EncoderSpec) -> Vectors:
    """Extract the texts' vectors from a packed output, as components."""
    return components(embedding.reshape(-1, embedding.shape[-1])[slots], spec)
