"""Run several texts in one row of the model, exactly as if each were alone.

Most texts are far shorter than the limit, so a padded batch is mostly padding. Here texts lie one after another in rows
of equal length; position ids restart with each text and attention stays within it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mirror_runtime.bundle import Pooling

BLOCK = 16
"""Row lengths are multiples of this: attention kernels are slow for others."""


@dataclass(frozen=True, kw_only=True)
class PackedTexts:
    """Texts laid out in rows.

    Attributes:
        input_ids: int64 [rows, length]; the padding token where empty.
        position_ids: int64 [rows, length]: 0, 1, … within each text.
        text_ids: int64 [rows, length]: 0 where empty, else the text's index plus one.
        own: bool [rows, length]: False on padding inside a text's slots, which nothing attends to.
        first: int64 [texts]: flat index of each text's first token.
        sizes: int64 [texts]: slots of each text, padding included.
        tokens: the texts' own tokens in all rows.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    text_ids: torch.Tensor
    own: torch.Tensor
    first: torch.Tensor
    sizes: torch.Tensor
    tokens: int

    def attention(self) -> torch.Tensor:
        """Give who may attend to whom: bool [rows, 1, length, length], query before key.

        Empty slots attend to each other, so that no query is left without a key.
        """
        same = self.text_ids[:, :, None] == self.text_ids[:, None, :]
        return (same & self.own[:, None, :]).unsqueeze(1)


def row_length(max_tokens: int) -> int:
    """Give the shortest row that holds a text of `max_tokens` and suits the kernels."""
    return -(-max_tokens // BLOCK) * BLOCK


def pack(texts: Sequence[Sequence[int]], *, length: int, pad_id: int, pad_to: int | None = None) -> PackedTexts:
    """Lay texts out in rows, longest first, each in the first row with room (first-fit decreasing).

    Args:
        texts: token ids with special tokens; each non-empty and no longer than `length` and `pad_to`.
        length: of a row.
        pad_id: the padding token.
        pad_to: slots of every text, for `mean_padded`; None gives a text as many slots as it has tokens.

    Raises:
        ValueError: a text is empty or too long.
    """
    limit = length if pad_to is None else min(length, pad_to)
    sizes = [len(ids) if pad_to is None else pad_to for ids in texts]
    if any(not 0 < len(ids) <= limit for ids in texts) or max(sizes, default=0) > length:
        raise ValueError(f"texts of {min(map(len, texts))} to {max(map(len, texts))} tokens do not fit {limit} slots")
    used: list[int] = []
    place = [(0, 0)] * len(texts)
    for text in sorted(range(len(texts)), key=sizes.__getitem__, reverse=True):
        row = next((row for row, taken in enumerate(used) if taken + sizes[text] <= length), len(used))
        if row == len(used):
            used.append(0)
        place[text] = (row, used[row])
        used[row] += sizes[text]
    input_ids = [[pad_id] * length for _ in used]
    position_ids = [[0] * length for _ in used]
    text_ids = [[0] * length for _ in used]
    own = [[True] * length for _ in used]
    for text, (row, start) in enumerate(place):
        ids, size = texts[text], sizes[text]
        input_ids[row][start : start + len(ids)] = ids
        position_ids[row][start : start + size] = range(size)
        text_ids[row][start : start + size] = [text + 1] * size
        own[row][start + len(ids) : start + size] = [False] * (size - len(ids))
    return PackedTexts(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        text_ids=torch.tensor(text_ids),
        own=torch.tensor(own),
        first=torch.tensor([row * length + start for row, start in place]),
        sizes=torch.tensor(sizes),
        tokens=sum(map(len, texts)),
    )


def encode_packed(model: Any, packed: PackedTexts, pooling: Pooling) -> torch.Tensor:
    """Run the model over packed rows and pool each text.

    Args:
        model: an encoder of the BERT family with "sdpa" attention; the rows are moved to its device.
        packed: the texts.
        pooling: see `Pooling`; `mean_padded` needs rows that were packed with `pad_to`.

    Returns:
        float32 [texts, dim] in the order given to `pack`, not normalised.
    """
    device = model.device
    input_ids = packed.input_ids.to(device)
    # Embeddings and encoder are called by themselves: the 4-D mask then reaches the layers as it is, where the whole
    # model of transformers 4 refuses it.
    embedded = model.embeddings(
        input_ids=input_ids, position_ids=packed.position_ids.to(device), token_type_ids=torch.zeros_like(input_ids)
    )
    encoded = model.encoder(embedded, attention_mask=packed.attention().to(device))
    hidden: torch.Tensor = encoded.last_hidden_state
    flat = hidden.flatten(0, 1).float()
    if pooling is Pooling.CLS:
        return flat[packed.first.to(device)]
    sizes = packed.sizes.to(device)
    sums = flat.new_zeros(len(sizes) + 1, flat.shape[1])  # row 0 collects the empty slots
    sums = sums.index_add(0, packed.text_ids.to(device).flatten(), flat)
    means: torch.Tensor = sums[1:] / sizes[:, None]
    return means
