"""Batches and reference vectors, stored for `prove_plan.py` on a machine without this project."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encoders.reference import Reference
from export.proof.parity import FLOORS
from export.tensorrt.profiles import PADDED_BATCH, packed_ladder
from mirror_runtime.bundle import TOKENIZER_FILE, Layout, Precision, TensorSpec
from mirror_runtime.packing import ShapeSet, pack
from mirror_runtime.tokenizer import LongTexts, Tokenized, Tokenizer

SAMPLES = 48
"""Texts stored: of every length that the parity texts have."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One batch.

    Attributes:
        feed: the graph's inputs.
        slots: where each text's vector is in the flattened output.
        texts: which texts these are.
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
        pad_to=spec.pad_to if layout is Layout.PACKED else None,  # the padded graph fills up by itself
    )
    tokenized = tokenizer(chosen)
    # Texts of equal tokens are one piece: the first of them speaks for it.
    vectors = reference.encode(chosen)[np.unique(tokenized.parts, return_index=True)[1]]
    batches = _packed(tokenized, packed_ladder(spec)) if layout is Layout.PACKED else _padded(tokenized)
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


def _packed(tokenized: Tokenized, ladder: ShapeSet) -> Iterator[Sample]:
    for batch in pack(tokenized.ids, tokenized.lengths, ladder, own=tokenized.own):
        rows = batch.rows
        feed = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "segment_ids": rows.segment_ids}
        yield Sample(feed=feed, slots=batch.slots, texts=batch.pieces)


def _padded(tokenized: Tokenized) -> Iterator[Sample]:
    starts = np.cumsum(tokenized.lengths) - tokenized.lengths
    usual = PADDED_BATCH[1]
    for texts in np.array_split(np.argsort(tokenized.lengths, kind="stable"), -(-tokenized.lengths.size // usual)):
        lengths = tokenized.lengths[texts]
        mask = np.arange(lengths.max())[None, :] < lengths[:, None]
        input_ids = np.zeros(mask.shape, np.int64)
        input_ids[mask] = np.concatenate([tokenized.ids[starts[i] :][: tokenized.lengths[i]] for i in texts])
        zeros = np.zeros_like(input_ids)
        feed = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "token_type_ids": zeros}
        yield Sample(feed=feed, slots=np.arange(texts.size), texts=texts)
