"""The forward pass of all families over rows that hold one or several texts each.

Modules are called one by one: not every release of transformers accepts a mask of query against key, and some models
accept no position ids. Exported graphs are traced from this code, so a different operation is a different graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from encoders.families import FAMILIES, Family, LayerNames

MAX_DISTANCE = 128
"""MPNet's bias is the same for all tokens at least this far apart."""

Pick = Callable[[torch.Tensor], torch.Tensor]
"""Selects K of L positions: float [R, n, L, X] -> float [R, n, K, X]."""

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, nn.Module], tuple[torch.Tensor, torch.Tensor | None]
]
"""(query, key, value [R, heads, L, head dim], mask, dropout module) -> (context of the same shape as query,
probabilities [R, heads, L, L] or None)."""


def hidden_states(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    token_type_ids: torch.Tensor | None = None,
    attentions_of: int | None = None,
    pick: Pick | None = None,
    attention: Attention | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run an encoder over rows that hold one or several texts each.

    Args:
        model: of one of `FAMILIES`.
        input_ids: int64 [R, L].
        position_ids: int64 [R, L]: 0, 1, … within each text, whatever row the family's table starts with.
        mask: which query sees which key, [R, 1, L or 1, L]. Bool: True if seen. Floating: added to the scores.
        token_type_ids: int64 [R, L]; None means zero everywhere.
        attentions_of: number of the layer, from 0, whose attention probabilities are returned.
        pick: selects positions of the last layer's output; the others are not computed.
        attention: how to attend. None means `fused_attention` with a Boolean mask, and with a floating one
            `plain_attention`, whose matrix products engines recognise. Layer `attentions_of` always uses the latter.

    Returns:
        Like Hugging Face's `hidden_states`: float [R, L, dim] of the embeddings and of each layer (the last one
        [R, K, dim] with `pick`); and the attention probabilities float [R, heads, L, L] of layer `attentions_of`.
    """
    family = FAMILIES[model.config.model_type]
    layers = model.get_submodule(family.layers)
    heads: int = model.config.num_attention_heads
    attend = attention or (fused_attention if mask.dtype is torch.bool else plain_attention)
    if family.relative_bias:
        bias = _relative_bias(model, input_ids.shape[1], input_ids.device)
        mask = torch.where(mask, bias, float("-inf")) if mask.dtype is torch.bool else mask + bias
    states = [_embed(model, family, input_ids, position_ids, token_type_ids)]
    probabilities = None
    for index, layer in enumerate(layers):
        state, weights = _run_layer(
            layer,
            family.names,
            heads,
            states[-1],
            mask,
            plain_attention if index == attentions_of else attend,
            pick if index == len(layers) - 1 else None,
        )
        states.append(state)
        if index == attentions_of:
            probabilities = weights
    return states, probabilities


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: nn.Module
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend in matrix products, and return the probabilities. An `Attention`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    weights = dropout(scores.softmax(dim=-1).to(value.dtype))
    return torch.matmul(weights, value), weights


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: nn.Module
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with PyTorch's fused kernel. An `Attention`."""
    probability = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    mask = mask if mask.dtype is torch.bool else mask.to(query.dtype)
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=probability), None


def _embed(
    model: Any,
    family: Family,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
) -> torch.Tensor:
    table = model.embeddings
    hidden = table.word_embeddings(input_ids)
    if hasattr(table, "token_type_embeddings"):
        types = table.token_type_embeddings
        hidden = hidden + (types.weight[0] if token_type_ids is None else types(token_type_ids))
    rows = _skip_padding(input_ids, position_ids, table.padding_idx) if family.skips_padding else position_ids
    hidden = table.dropout(table.LayerNorm(hidden + table.position_embeddings(rows)))
    if hasattr(model, "embeddings_project"):  # ELECTRA, if the table is narrower than the layers
        hidden = model.embeddings_project(hidden)
    states: torch.Tensor = hidden
    return states


def _skip_padding(input_ids: torch.Tensor, position_ids: torch.Tensor, padding: int) -> torch.Tensor:
    """Return rows of a position table whose positions start after the padding token's row, int64 [R, L].

    As in transformers, padding tokens have that row and are not counted, also if a text spells the padding token out.
    """
    is_padding = input_ids == padding
    before = is_padding.cumsum(1) - is_padding.long()  # earlier padding in the row
    first = torch.arange(input_ids.shape[1], device=input_ids.device) - position_ids  # slot of the text's first token
    rows = position_ids + (padding + 1) - (before - before.gather(1, first))
    return torch.where(is_padding, padding, rows)


def _run_layer(
    layer: nn.Module,
    names: LayerNames,
    heads: int,
    hidden: torch.Tensor,
    mask: torch.Tensor,
    attend: Attention,
    pick: Pick | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    module = layer.get_submodule

    def split_heads(values: torch.Tensor) -> torch.Tensor:
        return values.view(*values.shape[:-1], heads, -1).transpose(1, 2)

    inputs = _cast_once(hidden)
    residual, query_inputs = hidden, inputs
    if pick is not None:
        residual = query_inputs = pick(hidden[:, None])[:, 0]
        if mask.shape[2] > 1:
            mask = pick(mask)
    context, weights = attend(
        split_heads(module(names.query)(query_inputs)),
        split_heads(module(names.key)(inputs)),
        split_heads(module(names.value)(inputs)),
        mask,
        module(names.attention_dropout),
    )
    attended = module(names.output)(context.transpose(1, 2).flatten(2))
    if names.output_dropout is not None:
        attended = module(names.output_dropout)(attended)
    attended = module(names.output_norm)(attended + residual)
    feed_forward = module(names.down)(module(names.activation)(module(names.up)(attended)))
    return module(names.down_norm)(module(names.down_dropout)(feed_forward) + attended), weights


def _cast_once(hidden: torch.Tensor) -> torch.Tensor:
    """Cast as autocast would, if it is on: once, instead of for each of the three projections."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def _relative_bias(model: Any, length: int, device: torch.device) -> torch.Tensor:
    """Return MPNet's bias by the distance of two slots, query before key: float [1, heads, length, length].

    The tokens of a text are adjacent, so their distance in the row is their distance in the text.
    """
    # A constant of the graph: buckets come from a rounded logarithm, which engines may round differently.
    buckets = torch.tensor(
        [relative_bucket(distance) for distance in range(-MAX_DISTANCE, MAX_DISTANCE + 1)], device=device
    )
    slots = torch.arange(length, device=device)
    distances = (slots[None, :] - slots[:, None]).clamp(-MAX_DISTANCE, MAX_DISTANCE)
    of_distance = model.encoder.relative_attention_bias(buckets)
    bias: torch.Tensor = nn.functional.embedding(distances + MAX_DISTANCE, of_distance).permute(2, 0, 1)[None]
    return bias


def relative_bucket(distance: int) -> int:
    """Return the row of MPNet's bias table for a key `distance` tokens after the query.

    The table has 16 rows for keys at or before the query, then 16 for later ones. Distances below 8 have one row each;
    larger ones share 8 rows whose limits grow by the square root of 2.
    """
    size = abs(distance)
    row = size if size < 8 else min(15, 7 + (size * size // 64).bit_length())
    return row + 16 if distance > 0 else row
