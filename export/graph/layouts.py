"""The transformer inside the graphs: what the inputs of each layout mean, as positions and as who sees whom."""

from __future__ import annotations

from typing import Any

import torch

from encoders.families import Pick, hidden_states

BLOCKED = -10_000.0
"""Added to the attention scores of pairs that must not see each other. exp() of it is exactly 0 in every precision, it
is representable in fp16 and bf16 (unlike the smallest float), and unlike -inf it gives no NaN where a kernel meets a
block of blocked pairs only."""


def padded_states(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    *,
    attentions_of: int | None = None,
    pick: Pick | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run rows of one text each.

    Args:
        model: of a supported family, in evaluation mode.
        input_ids: int64 [batch_size, sequence_length].
        attention_mask: int64 [batch_size, sequence_length]: 1 on the text's own tokens, which come first.
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
    """Run rows of several texts each.

    Args:
        model: of a supported family, in evaluation mode.
        input_ids: int64 [rows, length]; any token where empty.
        position_ids: int64 [rows, length]: 0, 1, … within each text.
        segment_ids: int64 [rows, length]: 0 where empty, else 1, 2, … for the texts of the row.
        padding: bool [rows, length], True on padding that belongs to a text, which sees it and which nothing sees;
            None where texts have none.
        attentions_of: see `hidden_states`.
        pick: see `hidden_states`.

    Returns:
        See `hidden_states`.
    """
    # Empty positions see each other, so that every position sees something.
    seen = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if padding is not None:
        seen = seen & ~padding[:, None, None, :]
    return hidden_states(
        model,
        input_ids,
        position_ids,
        torch.where(seen, 0.0, BLOCKED),
        attentions_of=attentions_of,
        pick=pick,
    )
