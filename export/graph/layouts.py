"""The transformer inside the graphs: positions and attention mask from the inputs of each layout."""

from __future__ import annotations

from typing import Any

import torch

from encoders.layers import Pick, hidden_states

BLOCKED = -10_000.0
"""Added to the attention scores of pairs that must not attend to each other. Its exp() is exactly 0 in every precision,
it is representable in fp16 and bf16 (unlike the smallest float), and unlike -inf it causes no NaN where a kernel meets
a block of blocked pairs only."""


def padded_states(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    *,
    attentions_of: int | None = None,
    pick: Pick | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run the transformer on rows of one text each.

    Args:
        model: of a supported family, in evaluation mode.
        input_ids: int64 [batch_size, sequence_length].
        attention_mask: int64 [batch_size, sequence_length]: 1 on the text's tokens, which come first.
        token_type_ids: int64 [batch_size, sequence_length], for the families that have them.
        attentions_of: see `hidden_states`.
        pick: see `hidden_states`.

    Returns:
        See `hidden_states`.
    """
    return hidden_states(
        model,
        input_ids,
        torch.arange(input_ids.shape[1])[None, :].expand_as(input_ids),
        torch.where(attention_mask.to(torch.bool)[:, None, None, :], 0.0, BLOCKED),
        token_type_ids=token_type_ids,
        attentions_of=attentions_of,
        pick=pick,
    )


def packed_states(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    *,
    padding: torch.Tensor | None = None,
    attentions_of: int | None = None,
    pick: Pick | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run the transformer on rows of several texts each.

    Args:
        model: of a supported family, in evaluation mode.
        input_ids: int64 [rows, length]; any token at empty positions.
        position_ids: int64 [rows, length]: 0, 1, … within each text.
        segment_ids: int64 [rows, length]: 1, 2, … for the texts of the row, 0 at empty positions.
        padding: bool [rows, length], True on padding that belongs to a text: it attends to the text, and nothing
            attends to it. None where texts have no padding.
        attentions_of: see `hidden_states`.
        pick: see `hidden_states`.

    Returns:
        See `hidden_states`.
    """
    # Empty positions attend to each other, so that every position attends to something.
    visible = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if padding is not None:
        visible = visible & ~padding[:, None, None, :]
    return hidden_states(
        model,
        input_ids,
        position_ids,
        torch.where(visible, 0.0, BLOCKED),
        attentions_of=attentions_of,
        pick=pick,
    )
