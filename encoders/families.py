"""The families of transformers whose texts can be packed, and one forward pass for all of them.

They share their arithmetic (attention, residual, LayerNorm, feed-forward, residual, LayerNorm) and differ in names, in
positions and in what is added to the embeddings. Their modules are called one by one, since the models of transformers
take no mask of query against key in every release, and some take no positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

REACH = 128
"""Tokens farther apart than this have the same bias in MPNet."""

Pick = Callable[[torch.Tensor], torch.Tensor]
"""Takes rows of float [R, n, L, X] and gives those wanted, [R, n, K, X]."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a family calls the modules of a layer, relative to the layer.

    Attributes:
        query: projection; `key` and `value` likewise.
        key: see `query`.
        value: see `query`.
        attention_dropout: on the attention probabilities.
        output: projection of what the heads give.
        output_dropout: behind it; None where there is none.
        output_norm: of the first residual.
        up: the feed-forward's first projection.
        activation: between both.
        down: the second.
        down_dropout: behind it.
        down_norm: of the second residual.
    """

    query: str
    key: str
    value: str
    attention_dropout: str
    output: str
    output_dropout: str | None
    output_norm: str
    up: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    down_dropout: str = "output.dropout"
    down_norm: str = "output.LayerNorm"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of encoder, as data.

    Attributes:
        names: of a layer's modules.
        layers: where the model keeps its layers.
        token_types: texts come with token types, so the padded graph has them as an input.
        skips_padding: positions begin behind the padding token's row of the table, and padding is not counted.
        padding_row: that row where the family fixes it; None where it is the configuration's `pad_token_id`.
        relative_bias: attention scores get a bias by the distance of two tokens, the same in all layers.
        dim: the configuration's key for the width of a vector.
    """

    names: Names
    layers: str = "encoder.layer"
    token_types: bool = False
    skips_padding: bool = False
    padding_row: int | None = None
    relative_bias: bool = False
    dim: str = "hidden_size"

    def first_position(self, config: Mapping[str, Any]) -> int:
        """Give the row of the position table that a text's first token has.

        Args:
            config: `config.json`.
        """
        if not self.skips_padding:
            return 0
        return 1 + (config.get("pad_token_id", 1) if self.padding_row is None else self.padding_row)


BERT_NAMES = Names(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_dropout="attention.self.dropout",
    output="attention.output.dense",
    output_dropout="attention.output.dropout",
    output_norm="attention.output.LayerNorm",
)

DISTILBERT_NAMES = Names(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_dropout="attention.dropout",
    output="attention.out_lin",
    output_dropout=None,
    output_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    down_dropout="ffn.dropout",
    down_norm="output_layer_norm",
)

MPNET_NAMES = Names(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_dropout="attention.attn.dropout",
    output="attention.attn.o",
    output_dropout="attention.dropout",
    output_norm="attention.LayerNorm",
)

ROBERTA = Family(names=BERT_NAMES, skips_padding=True)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Family(names=BERT_NAMES, token_types=True),
        "roberta": ROBERTA,
        "xlm-roberta": ROBERTA,
        "camembert": ROBERTA,
        "distilbert": Family(names=DISTILBERT_NAMES, layers="transformer.layer", dim="dim"),
        "electra": Family(names=BERT_NAMES, token_types=True),
        "mpnet": Family(names=MPNET_NAMES, skips_padding=True, padding_row=1, relative_bias=True),
    }
)
"""Those that packed rows and both graphs are proven with, by `model_type`."""


def hidden_states(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    token_type_ids: torch.Tensor | None = None,
    attentions_of: int | None = None,
    pick: Pick | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run an encoder over rows that hold one or several texts each.

    Args:
        model: of one of `FAMILIES`.
        input_ids: int64 [R, L].
        position_ids: int64 [R, L]: 0, 1, … within each text, whatever the family's table begins with.
        mask: who sees whom, query before key, [R, 1, L or 1, L]. Bool: True where seen; attention is then PyTorch's
            fused one, or spelled out with fast dropout (see `training.dropout`). Floating: added to the scores, and
            attention is spelled out in matrix products, as engines recognise it.
        token_type_ids: int64 [R, L]; None is zero everywhere.
        attentions_of: number of the layer, from 0, whose attention probabilities are wanted.
        pick: rows of the last layer's output that are wanted; the others are not computed.

    Returns:
        As Hugging Face's `hidden_states`, float [R, L, dim], of the embeddings and of each layer (the last one
        [R, K, dim] with `pick`); and the attention probabilities float [R, heads, L, L] of layer `attentions_of`.
    """
    family = FAMILIES[model.config.model_type]
    layers = model.get_submodule(family.layers)
    heads: int = model.config.num_attention_heads
    attend = _fused if mask.dtype is torch.bool else _spelled_out
    if family.relative_bias:
        bias = _relative_bias(model, input_ids.shape[1], input_ids.device)
        mask = torch.where(mask, bias, float("-inf")) if mask.dtype is torch.bool else mask + bias
    states = [_embed(model, family, input_ids, position_ids, token_type_ids)]
    probabilities = None
    for index, layer in enumerate(layers):
        part = pick if index == len(layers) - 1 else None
        state, weights = _layer(
            layer, family.names, heads, states[-1], mask, _spelled_out if index == attentions_of else attend, part
        )
        states.append(state)
        if index == attentions_of:
            probabilities = weights
    return states, probabilities


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
    if hasattr(model, "embeddings_project"):  # ELECTRA, where the table is narrower than the layers
        hidden = model.embeddings_project(hidden)
    states: torch.Tensor = hidden
    return states


def _skip_padding(input_ids: torch.Tensor, position_ids: torch.Tensor, padding: int) -> torch.Tensor:
    """Give the rows of a position table that begins behind the padding token's row, int64 [R, L].

    As in transformers, padding has that row, also where a text spells the padding token out, and is not counted.
    """
    is_padding = input_ids == padding
    before = is_padding.cumsum(1) - is_padding.long()  # padding ahead in the row
    first = torch.arange(input_ids.shape[1], device=input_ids.device) - position_ids  # slot of the text's first token
    rows = position_ids + (padding + 1) - (before - before.gather(1, first))
    return torch.where(is_padding, padding, rows)


def _layer(
    layer: nn.Module,
    names: Names,
    heads: int,
    hidden: torch.Tensor,
    mask: torch.Tensor,
    attend: Attend,
    pick: Pick | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    module = layer.get_submodule

    def split(values: torch.Tensor) -> torch.Tensor:
        return values.view(*values.shape[:-1], heads, -1).transpose(1, 2)

    seen = _lowered(hidden)
    asking, questions = hidden, seen
    if pick is not None:
        asking = questions = pick(hidden[:, None])[:, 0]
        if mask.shape[2] > 1:
            mask = pick(mask)
    context, weights = attend(
        split(module(names.query)(questions)),
        split(module(names.key)(seen)),
        split(module(names.value)(seen)),
        mask,
        module(names.attention_dropout),
    )
    given = module(names.output)(context.transpose(1, 2).flatten(2))
    if names.output_dropout is not None:
        given = module(names.output_dropout)(given)
    given = module(names.output_norm)(given + asking)
    fed = module(names.down)(module(names.activation)(module(names.up)(given)))
    return module(names.down_norm)(module(names.down_dropout)(fed) + given), weights


def _lowered(hidden: torch.Tensor) -> torch.Tensor:
    """Cast as autocast will, where it is on: once, and not again for each of the three projections."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, nn.Module], tuple[torch.Tensor, torch.Tensor | None]
]
"""(query, key, value [R, heads, L, head dim], mask, dropout) -> what the heads give, and the probabilities."""


def _spelled_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: nn.Module
) -> tuple[torch.Tensor, torch.Tensor | None]:
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    weights = dropout(scores.softmax(dim=-1).to(value.dtype))
    return torch.matmul(weights, value), weights


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: nn.Module
) -> tuple[torch.Tensor, torch.Tensor | None]:
    attend: Any = getattr(dropout, "attend", None)  # of a dropout that brings its own attention
    if attend is not None and dropout.training:
        return attend(query, key, value, mask), None
    probability = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    mask = mask if mask.dtype is torch.bool else mask.to(query.dtype)
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=probability), None


def _relative_bias(model: Any, length: int, device: torch.device) -> torch.Tensor:
    """Give MPNet's bias, from the distance of each two slots: float [1, heads, length, length], query before key.

    A text's tokens lie side by side, so their distance in the row is their distance in the text.
    """
    # A constant of the graph: buckets come from a rounded logarithm, which engines may round otherwise.
    buckets = torch.tensor([relative_bucket(distance) for distance in range(-REACH, REACH + 1)], device=device)
    slots = torch.arange(length, device=device)
    distances = (slots[None, :] - slots[:, None]).clamp(-REACH, REACH)
    of_distance = model.encoder.relative_attention_bias(buckets)
    bias: torch.Tensor = nn.functional.embedding(distances + REACH, of_distance).permute(2, 0, 1)[None]
    return bias


def relative_bucket(distance: int) -> int:
    """Give the row of MPNet's bias table for a key `distance` tokens behind the query.

    The table has 16 rows for keys ahead of the query or at it, then 16 for those behind it. Distances below 8 have one
    row each, larger ones share 8 rows whose limits grow by the square root of 2.
    """
    size = abs(distance)
    row = size if size < 8 else min(15, 7 + (size * size // 64).bit_length())
    return row + 16 if distance > 0 else row
