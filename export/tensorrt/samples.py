"""Store batches and reference vectors for `prove_plan.py` on a machine without this project."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encoders.reference import Reference
from export.proof.floors import FLOORS
from export.proof.padded import padded_feed
from export.tensorrt.profiles import PADDED_BATCH, packed_shape_set
from mirror_runtime.bundle import TOKENIZER_FILE, Layout, Precision, TensorSpec
from mirror_runtime.packing import ShapeSet, pack
from mirror_runtime.tokenizer import LongTexts, Tokenized, Tokenizer

SAMPLES = 48
"""Texts to store, spread over the lengths of the parity texts."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One batch.

    Attributes:
        feed: the graph's inputs.
        slots: position of each text's vector in the flattened output.
        texts: indices of the texts.
    """

    feed: dict[str, NDArray[np.int64]]
    slots: NDArray[np.int64]
    texts: NDArray[np.int64]


def write_samples(
    path: Path,
    bundle: Path,
    reference: Reference,
    texts: Sequence[str],
    *,
    layout: Layout,
    precision: Precision,
    inputs: Sequence[TensorSpec],
) -> None:
    """Store batches of some texts, spread over all lengths, with the reference's vectors and the precision's floor."""
    spec = reference.spec
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    chosen = [texts[order[i * len(order) // SAMPLES]] for i in range(SAMPLES)] if len(order) > SAMPLES else list(texts)
    tokenizer = Tokenizer(
        bundle / TOKENIZER_FILE,
        spec.max_tokens,
        LongTexts.TRUNCATE,
        template=spec.template,
        pad_to=spec.pad_to if layout is Layout.PACKED else None,  # the padded graph pads by itself
    )
    tokenized = tokenizer(chosen)
    # Texts with equal tokens share one piece: the first of them stands for it.
    vectors = reference.encode(chosen)[np.unique(tokenized.part_piece, return_index=True)[1]]
    batches = _packed(tokenized, packed_shape_set(spec)) if layout is Layout.PACKED else _padded(tokenized)
    stored: dict[str, NDArray[np.generic] | float | str] = {
        "floor": FLOORS[precision],
        "output": "embedding" if layout is Layout.PACKED else "sentence_embedding",
    }
    count = 0
    for index, sample in enumerate(batches):
        stored |= {f"{index}/input/{tensor.name}": sample.feed[tensor.name] for tensor in inputs}
        stored |= {f"{index}/slots": sample.slots, f"{index}/vectors": vectors[sample.texts]}
        count += 1
    np.savez_compressed(path, batches=count, **stored)


def _packed(tokenized: Tokenized, shape_set: ShapeSet) -> Iterator[Sample]:
    for batch in pack(tokenized.ids, tokenized.lengths, shape_set, unpadded_lengths=tokenized.unpadded_lengths):
        rows = batch.rows
        feed = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "segment_ids": rows.segment_ids}
        yield Sample(feed=feed, slots=batch.slots, texts=batch.pieces)


def _padded(tokenized: Tokenized) -> Iterator[Sample]:
    usual = PADDED_BATCH[1]
    for texts in np.array_split(np.argsort(tokenized.lengths, kind="stable"), -(-tokenized.lengths.size // usual)):
        yield Sample(feed=padded_feed(tokenized, texts), slots=np.arange(texts.size), texts=texts)
