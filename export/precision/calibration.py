"""What flows into a packed graph's linear layers on real text: where int8 and fp8 take their scales from."""

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
from mirror_runtime.docstrings import standard_library
from mirror_runtime.errors import InputError
from mirror_runtime.packing import ShapeSet, pack
from mirror_runtime.tokenizer import LongTexts, Tokenizer
from mirror_runtime.vectors import components, cosines

TOKENS = 10_000
"""Tokens to calibrate on: more did not move the vectors of MiniLM."""

ROWS = 256
"""Tokens whose vectors are kept of each layer, to try scales on."""

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
"""Texts without language: such tokens give the largest values in a transformer, and scales must reach them."""

_MOVES = frozenset({"Reshape", "Transpose", "Slice", "Gather", "Squeeze", "Unsqueeze", "Identity"})

Vectors = NDArray[np.float32]


class Origin(Enum):
    """What made a value: it says how far other texts may take it beyond what calibration saw."""

    NORM = "norm"
    ATTENTION = "attention"
    ACTIVATION = "activation"


@dataclass(frozen=True, kw_only=True)
class ActivationStats:
    """What was seen of the value that one or several linear layers read.

    Attributes:
        peak: float32 [channels], the largest magnitude of each.
        rows: float32 [n, channels], the value at n tokens.
        origin: what made it.
    """

    peak: Vectors
    rows: Vectors
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Packed batches of the calibration texts, the fp32 graph's vectors of them, and what its linear layers read.

    Attributes:
        spec: the encoder's.
        feeds: inputs of the packed graph, batch by batch.
        slots: of each batch, where in the flat output the texts' vectors lie.
        vectors: float32 [n, dim], batch by batch.
        flows: by position among `linear_inputs` of the graph.
    """

    spec: EncoderSpec
    feeds: tuple[Mapping[str, NDArray[np.int64]], ...]
    slots: tuple[NDArray[np.int64], ...]
    vectors: Vectors
    flows: tuple[ActivationStats, ...]

    @classmethod
    def run(cls, graph: Path, bundle: Path, spec: EncoderSpec, texts: Sequence[str] | None = None) -> Calibration:
        """Run the fp32 packed graph over texts.

        Args:
            graph: the packed ONNX file.
            bundle: the folder that holds the tokenizer.
            spec: the encoder's.
            texts: what to calibrate on; None takes docstrings of this Python and texts without language, none of which
                proves artifacts.

        Raises:
            InputError: the texts give no tokens.
        """
        feeds, slots = _batches(bundle, spec, texts)
        rewrite = Rewrite(graph)
        names = list(linear_inputs(rewrite))
        session = rewrite.session(reading=names)
        draw = np.random.default_rng(0)
        peaks: list[list[Vectors]] = [[] for _ in names]
        rows: list[list[Vectors]] = [[] for _ in names]
        vectors = []
        share = ROWS / sum(int((feed["segment_ids"] > 0).sum()) for feed in feeds)
        for feed, places in zip(feeds, slots, strict=True):
            tokens = np.flatnonzero(feed["segment_ids"].reshape(-1))
            embedding, *values = session.run([rewrite.outputs[0], *names], feed)
            vectors.append(_vectors(embedding, places, spec))
            for at, value in enumerate(values):
                flat = value.reshape(-1, value.shape[-1])
                # The last layer may compute one token of each text alone, in the text's slot.
                own = flat[tokens if len(flat) == feed["segment_ids"].size else places]
                peaks[at].append(np.abs(own).max(0))
                rows[at].append(own[draw.random(len(own)) < share])
        flows = (
            ActivationStats(peak=np.max(p, axis=0), rows=np.concatenate(r), origin=_origin(rewrite, name))
            for name, p, r in zip(names, peaks, rows, strict=True)
        )
        return cls(spec=spec, feeds=feeds, slots=slots, vectors=np.concatenate(vectors), flows=tuple(flows))

    def cosines(
        self, session: Any, batches: Sequence[int] | None = None, extra: Mapping[str, NDArray[np.bool_]] | None = None
    ) -> NDArray[np.float32]:
        """Compare a rewritten graph with the fp32 one.

        Args:
            session: of the rewritten graph.
            batches: which to run; None runs all.
            extra: inputs besides the packed graph's own.

        Returns:
            float32 [n], each text's cosine, batch by batch.
        """
        chosen = range(len(self.feeds)) if batches is None else batches
        ends = np.cumsum([len(places) for places in self.slots])
        found = [
            _vectors(session.run(None, {**self.feeds[i], **(extra or {})})[0], self.slots[i], self.spec) for i in chosen
        ]
        left = np.concatenate(found)
        right = np.concatenate([self.vectors[ends[i] - len(self.slots[i]) : ends[i]] for i in chosen])
        return cosines(left, right, np.float32)


def linear_inputs(graph: Rewrite) -> dict[str, list[NodeProto]]:
    """Find the values that the transformer's linear layers read, with the products that read them, in graph order.

    A linear layer is a product of a computed value and a matrix of weights. Those of the head are not listed.
    """
    backbone = graph.backbone()
    found: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        weight = graph.constant(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and len(weight.dims) == 2 and node.output[0] in backbone:
            found.setdefault(node.input[0], []).append(node)
    return found


def _origin(graph: Rewrite, name: str) -> Origin:
    """Follow a value back over what only moves numbers."""
    producers = {out: node for node in graph.nodes for out in node.output}
    while (node := producers.get(name)) is not None and node.op_type in _MOVES:
        name = node.input[0]
    if node is not None and node.op_type == "LayerNormalization":
        return Origin.NORM
    attends = node is not None and node.op_type == "MatMul" and not any(map(graph.constant, node.input))
    return Origin.ATTENTION if attends else Origin.ACTIVATION


def calibration_texts() -> Iterator[str]:
    """Give texts without language, then docstrings of this Python's standard library that prove no artifact."""
    yield from DEGENERATE
    proving = set(parity_texts())
    others = [item.text for item in standard_library() if item.text not in proving and len(item.text) <= 2000]
    order = np.random.default_rng(0).permutation(len(others))
    for at in order:
        yield others[at]


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
        tokens += min(spec.max_tokens, len(text) // 4 + 2)  # about: the exact count does not matter
    window = tokenizer(chosen)
    if not window.lengths.size or window.errors:
        raise InputError("the calibration texts cannot be encoded: give --calibration a file of real text, one a line")
    batches = pack(window.ids, window.lengths, ShapeSet.up_to(spec.max_tokens))
    feeds = tuple(
        {name: getattr(batch.rows, name) for name in ("input_ids", "position_ids", "segment_ids")} for batch in batches
    )
    return feeds, tuple(batch.slots for batch in batches)


def _vectors(embedding: NDArray[Any], slots: NDArray[np.int64], spec: EncoderSpec) -> Vectors:
    """Take texts' vectors out of a packed output, as components."""
    return components(embedding.reshape(-1, embedding.shape[-1])[slots], spec)
