"""Pack several texts into each row of the model. Every text gets the vector that it would have alone.

Most texts are far shorter than the limit, so a padded batch is mostly padding. Packed texts lie one after another in
rows of equal length; position ids restart with each text and attention stays within it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encoders import layers as encoder_layers
from mirror_runtime.bundle import Pooling
from training import dropout

BLOCK = 16
"""Row lengths are multiples of this: attention kernels are slow for other lengths."""

POOLINGS = (Pooling.MEAN, Pooling.CLS, Pooling.MEAN_PADDED, Pooling.MAX, Pooling.WEIGHTED_MEAN, Pooling.LAST)
"""Supported by `pool_packed`. The others need a template or attention probabilities."""


@dataclass(frozen=True, kw_only=True)
class PackedTexts:
    """Texts laid out in rows."""

    input_ids: torch.Tensor  # int64 [rows, length]; empty slots hold the padding token
    position_ids: torch.Tensor  # int64 [rows, length]: 0, 1, … within each text
    text_ids: torch.Tensor  # int64 [rows, length]: 0 in empty slots, else the text's index plus one
    attended: torch.Tensor  # bool [rows, length]: False on padding inside a text's slots, which no token attends to
    first: torch.Tensor  # int64 [texts]: flat index of each text's first token
    sizes: torch.Tensor  # int64 [texts]: slots of each text, including padding
    tokens: int  # number of tokens in all rows, without padding

    def attention_mask(self) -> torch.Tensor:
        """Return which query may attend to which key: bool [rows, 1, length, length].

        Empty slots attend to each other, so that every query has a key.
        """
        same = self.text_ids[:, :, None] == self.text_ids[:, None, :]
        return (same & self.attended[:, None, :]).unsqueeze(1)

    def split(self, rows: int) -> Iterator[tuple[torch.Tensor, PackedTexts]]:
        """Yield pieces of at most `rows` rows, each after the indices of its texts in the whole, int64 [texts].

        No text spans two rows, so none spans two pieces.
        """
        length = self.input_ids.shape[1]
        row_of = self.first // length
        for start in range(0, len(self.input_ids), rows):
            end = start + rows
            chosen = ((row_of >= start) & (row_of < end)).nonzero().flatten()
            renumbered = torch.zeros(len(self.first) + 1, dtype=torch.int64)
            renumbered[chosen + 1] = torch.arange(1, len(chosen) + 1)
            text_ids, attended = renumbered[self.text_ids[start:end]], self.attended[start:end]
            yield (
                chosen,
                PackedTexts(
                    input_ids=self.input_ids[start:end],
                    position_ids=self.position_ids[start:end],
                    text_ids=text_ids,
                    attended=attended,
                    first=self.first[chosen] - start * length,
                    sizes=self.sizes[chosen],
                    tokens=int(((text_ids > 0) & attended).sum()),
                ),
            )


def row_length(max_tokens: int) -> int:
    """Return the shortest row length that fits a text of `max_tokens` and is a multiple of `BLOCK`."""
    return -(-max_tokens // BLOCK) * BLOCK


def pack(texts: Sequence[Sequence[int]], *, length: int, pad_id: int, pad_to: int | None = None) -> PackedTexts:
    """Pack texts into rows, longest first, each into the fullest row with room (best-fit decreasing).

    Args:
        texts: token ids with special tokens; each non-empty and no longer than `length` and `pad_to`.
        length: of a row.
        pad_id: the padding token.
        pad_to: slots of every text, for `mean_padded`; None means as many slots as the text has tokens.

    Raises:
        ValueError: a text is empty or too long.
    """
    limit = length if pad_to is None else min(length, pad_to)
    tokens = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    sizes = tokens if pad_to is None else np.full_like(tokens, pad_to)
    if len(texts) and (tokens.min() < 1 or tokens.max() > limit or sizes.max() > length):
        raise ValueError(f"texts of {tokens.min()} to {tokens.max()} tokens do not fit {limit} slots")
    starts, rows = _place(sizes, length)
    row_ids = np.arange(1, len(texts) + 1)
    slots, offsets = _spread(starts, sizes)
    flat_ids = np.full(rows * length, pad_id, dtype=np.int64)
    flat_ids[_spread(starts, tokens)[0]] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in texts])
    position_ids = np.zeros(rows * length, dtype=np.int64)
    position_ids[slots] = offsets
    text_ids = np.zeros(rows * length, dtype=np.int64)
    text_ids[slots] = np.repeat(row_ids, sizes)
    attended = np.ones(rows * length, dtype=np.bool_)
    attended[slots] = offsets < np.repeat(tokens, sizes)
    return PackedTexts(
        input_ids=torch.from_numpy(flat_ids.reshape(rows, length)),
        position_ids=torch.from_numpy(position_ids.reshape(rows, length)),
        text_ids=torch.from_numpy(text_ids.reshape(rows, length)),
        attended=torch.from_numpy(attended.reshape(rows, length)),
        first=torch.from_numpy(starts),
        sizes=torch.from_numpy(sizes),
        tokens=int(tokens.sum()),
    )


def _place(sizes: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], int]:
    """Return each text's flat start and the number of rows."""
    room_to_rows: list[list[int]] = [[] for _ in range(length + 1)]
    starts, rows = np.zeros_like(sizes), 0
    for text in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[text])
        room = next((room for room in range(size, length) if room_to_rows[room]), length)
        if room == length:
            row, rows = rows, rows + 1
        else:
            row = room_to_rows[room].pop()
        starts[text] = row * length + length - room
        room_to_rows[room - size].append(row)
    return starts, rows


def _spread(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the flat slots of all texts, one text after another, and each slot's offset within its text."""
    offsets = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts, sizes) + offsets, offsets


def encode_packed(model: Any, packed: PackedTexts, pooling: Pooling, layers: Sequence[int] = (-1,)) -> torch.Tensor:
    """Run the model over packed rows, average layers and pool each text; `mean_padded` needs rows with `pad_to`.

    Returns:
        float32 [texts, dim] in the order of the texts passed to `pack`, not normalised.
    """
    return encode_depths(model, packed, pooling, layers, ())[0]


def encode_depths(
    model: Any, packed: PackedTexts, pooling: Pooling, layers: Sequence[int], depths: Sequence[int]
) -> list[torch.Tensor]:
    """Return what `encode_packed` returns, then the same of the encoder that ends after each number of layers."""
    states = hidden_states(model, packed)
    ends = [states, *([*states[:depth], encoder_layers.finish(model, states[depth])] for depth in depths)]
    return [pool_packed(torch.stack([end[i] for i in layers]).float().mean(0), packed, pooling) for end in ends]


def hidden_states(model: Any, packed: PackedTexts) -> list[torch.Tensor]:
    """Run the model, on its device, over packed rows, with the attention of `training.dropout`.

    Returns:
        Like Hugging Face's `hidden_states`: float [rows, length, dim] of the embeddings and of each layer.
    """
    device = model.device
    states, _ = encoder_layers.hidden_states(
        model,
        packed.input_ids.to(device),
        packed.position_ids.to(device),
        packed.attention_mask().to(device),
        attention=dropout.attention,
    )
    return states


def pool_packed(hidden: torch.Tensor, packed: PackedTexts, pooling: Pooling) -> torch.Tensor:
    """Pool token vectors [rows, length, dim] in packed rows into one vector a text, float32 [texts, dim].

    Raises:
        ValueError: the pooling is not one of `POOLINGS`.
    """
    flat, device = hidden.flatten(0, 1).float(), hidden.device
    first, sizes = packed.first.to(device), packed.sizes.to(device)
    text_ids = packed.text_ids.to(device).flatten()
    if pooling is Pooling.CLS:
        return flat[first]
    if pooling is Pooling.LAST:
        return flat[first + sizes - 1]
    totals = flat.new_zeros(len(sizes) + 1, flat.shape[1])  # row 0 is for the empty slots
    if pooling is Pooling.MAX:
        attended = packed.attended.to(device).flatten()
        index = (text_ids * attended)[:, None].expand(-1, flat.shape[1])
        return totals.scatter_reduce(0, index, flat, "amax", include_self=False)[1:]
    if pooling is Pooling.WEIGHTED_MEAN:
        flat = flat * (packed.position_ids.to(device).flatten()[:, None] + 1)
        sizes = sizes * (sizes + 1) / 2
    elif pooling not in (Pooling.MEAN, Pooling.MEAN_PADDED):
        raise ValueError(f"packed rows do not support pooling {pooling.value}")
    means: torch.Tensor = totals.index_add(0, text_ids, flat)[1:] / sizes[:, None]
    return means
