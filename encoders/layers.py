"""The forward pass of all families over rows that hold one or several texts each.

Modules are called one by one: not every release of transformers accepts a mask of query against key, and some models
accept no position ids. Exported graphs are traced from this code, so a different operation is a different graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from encoders.families import FAMILIES, Family, Layer, Residual

MAX_DISTANCE = 128
"""The bias of MPNet and T5 is the same for all tokens at least this far apart."""

BLOCKED = -10_000.0
"""Added to the attention scores of pairs that must not attend to each other. Its exp() is exactly 0 in every precision,
it is representable in fp16 and bf16 (unlike the smallest float), and unlike -inf it causes no NaN where a kernel meets
a block of blocked pairs only."""

Pick = Callable[[torch.Tensor], torch.Tensor]
"""Selects K of L positions: float [R, n, L, X] -> float [R, n, K, X]."""

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, nn.Module, float],
    tuple[torch.Tensor, torch.Tensor | None],
]
"""(query, key, value [R, heads, L, head dim], mask, dropout module, factor of the scores) -> (context of the same shape
as query, probabilities [R, heads, L, L] or None)."""

PositionTables = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""What positions contribute that no text changes. Rotary: cosines and sines, float [positions, head dim], by kind of
layer. Disentangled: keys and queries of all distances, float [heads, head dim, 2 x span], by the layer's number."""


@dataclass(frozen=True)
class _Rows:
    """What all layers of a pass share."""

    heads: int
    key_heads: int  # heads of keys and values
    mask: torch.Tensor  # with the bias of relative positions
    masks: dict[tuple[bool, int | None], torch.Tensor]  # by causal and window: with what such layers hide
    kinds: Sequence[str]  # of layers
    rotations: PositionTables  # of each slot, [R, 1, L, head dim]
    # Tables of distances, and the column of each pair, query before key, int64 [L, L]
    disentangled: tuple[PositionTables, torch.Tensor] | None


def layers_of(model: Any) -> list[nn.Module]:
    """List the layers in the order in which they run; layers that share weights occur several times."""
    family = FAMILIES[model.config.model_type]
    if family.layers is None:
        return []
    layers = list(model.get_submodule(family.layers))
    if family.group is None:
        return layers
    depth: int = model.config.num_hidden_layers
    groups = [layers[int(i / (depth / len(layers)))] for i in range(depth)]
    return [layer for group in groups for layer in group.get_submodule(family.group)]


def layer_names(model: Any) -> Layer:
    """Return the names of the modules in a model's layers."""
    family = FAMILIES[model.config.model_type]
    if family.flagged is not None and getattr(model.config, family.flagged[0]):
        return family.flagged[1]
    return family.layer


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
    tables: PositionTables | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run an encoder over rows that hold one or several texts each.

    Args:
        model: of one of `FAMILIES`.
        input_ids: int64 [R, L].
        position_ids: int64 [R, L]: 0, 1, … within each text, whatever row the family's table starts with.
        mask: which query sees which key, [R, 1, L or 1, L]. Bool: True if seen. Floating: added to the scores. What
            causal layers and windows hide is hidden in addition: the tokens of a text are adjacent, so their distance
            in the row is their distance in the text.
        token_type_ids: int64 [R, L]; None means zero everywhere.
        attentions_of: number of the layer, from 0, whose attention probabilities are returned.
        pick: selects positions of the last layer's output; the others are not computed.
        attention: how to attend. None means `fused_attention` with a Boolean mask, and with a floating one
            `plain_attention`, whose matrix products engines recognise. Layer `attentions_of` always uses the latter.
        tables: of all positions, see `position_tables`; None computes them.

    Returns:
        Like Hugging Face's `hidden_states`: float [R, L, dim] of the embeddings and of each layer (the last one
        [R, K, dim] with `pick`); and the attention probabilities float [R, heads, L, L] of layer `attentions_of`.
    """
    family = FAMILIES[model.config.model_type]
    layers, names = layers_of(model), layer_names(model)
    attend = attention or (fused_attention if mask.dtype is torch.bool else plain_attention)
    rows = _shared(model, family, position_ids, mask, tables)
    states = [_embed(model, family, input_ids, position_ids, token_type_ids)]
    probabilities = None
    for index, layer in enumerate(layers):
        state, weights = _run_layer(
            layer,
            names,
            index,
            rows,
            states[-1],
            plain_attention if index == attentions_of else attend,
            pick if index == len(layers) - 1 else None,
        )
        states.append(state)
        if index == attentions_of:
            probabilities = weights
    states[-1] = finish(model, states[-1])
    return states, probabilities


def finish(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Apply the family's steps after the last layer to a layer's output, of any shape [..., width]."""
    return _steps(model, FAMILIES[model.config.model_type].last_steps, hidden)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: nn.Module, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend in matrix products, and return the probabilities. An `Attention`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    weights = dropout(scores.softmax(dim=-1).to(value.dtype))
    return torch.matmul(weights, value), weights


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: nn.Module, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with PyTorch's fused kernel. An `Attention`."""
    probability = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    mask = mask if mask.dtype is torch.bool else mask.to(query.dtype)
    context = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=probability, scale=scale)
    return context, None


def position_tables(model: Any, positions: int) -> PositionTables:
    """Compute the tables of positions 0 to `positions` - 1; empty for families without such positions."""
    family = FAMILIES[model.config.model_type]
    if family.rotary is not None:
        return _rotations(model, model.get_submodule(family.rotary), positions)
    if family.disentangled is not None:
        return _projected_distances(model, family)
    return {}


def _rotations(model: Any, rotary: nn.Module, positions: int) -> PositionTables:
    """Compute what rotary positions multiply queries and keys by.

    Computed in fp32: half precision does not hold the product of a position and a frequency.
    """
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for kind in sorted(set(getattr(model.config, "layer_types", None) or [""])):
        own = hasattr(rotary, f"{kind}_inv_freq")
        frequencies, factor = (
            getattr(rotary, f"{kind}_{name}" if own else name) for name in ("inv_freq", "attention_scaling")
        )
        angles = torch.arange(positions, device=frequencies.device)[:, None].float() * frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        found[kind] = (angles.cos() * factor, angles.sin() * factor)
    return found


def _projected_distances(model: Any, family: Family) -> PositionTables:
    """Project DeBERTa's table of distances by each layer, as keys and as queries."""
    table, names = model.get_submodule(family.disentangled).weight, layer_names(model)
    table = _steps(model, tuple(filter(None, (family.disentangled_norm,))), table)

    def project(layer: nn.Module, own: str | None, shared: str, distances: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = (_optional(layer, own) or layer.get_submodule(shared))(distances)
        return projected.view(len(table), model.config.num_attention_heads, -1).permute(1, 2, 0)

    found = {}
    for index, layer in enumerate(layers_of(model)):
        kept = _apply(layer, names.position_dropout, table)
        found[str(index)] = (
            project(layer, names.position_key, names.key, kept),
            project(layer, names.position_query, names.query, kept),
        )
    return found


def _shared(
    model: Any, family: Family, position_ids: torch.Tensor, mask: torch.Tensor, tables: PositionTables | None
) -> _Rows:
    length, config = position_ids.shape[1], model.config
    if family.relative_bias is not None:
        mask = _add_bias(mask, _relative_bias(model.get_submodule(family.relative_bias), length, mask.device))
    tables = position_tables(model, length) if tables is None else tables
    rotary = tables.items() if family.rotary is not None else ()
    return _Rows(
        heads=config.num_attention_heads,
        key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        mask=mask,
        masks={},
        kinds=getattr(config, "layer_types", None) or [""] * len(layers_of(model)),
        rotations={kind: (c[position_ids][:, None], s[position_ids][:, None]) for kind, (c, s) in rotary},
        disentangled=(tables, _distance_columns(model, family, length)) if family.disentangled is not None else None,
    )


def _add_bias(mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, bias, float("-inf")) if mask.dtype is torch.bool else mask + bias


def _embed(
    model: Any,
    family: Family,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
) -> torch.Tensor:
    hidden = model.get_submodule(family.words)(input_ids)
    types, table = _optional(model, family.types), _optional(model, family.positions)
    if types is not None:
        hidden = hidden + (types.weight[0] if token_type_ids is None else types(token_type_ids))
    if table is not None:
        rows = _skip_padding(input_ids, position_ids, table.padding_idx) if family.skips_padding else position_ids
        hidden = hidden + table(rows)
    return _steps(model, family.embedding_steps, hidden)


def _optional(parent: nn.Module, path: str | None) -> Any:
    """Return a module, or None if the parent has none there."""
    try:
        return None if path is None else parent.get_submodule(path)
    except AttributeError:
        return None


def _steps(model: nn.Module, paths: tuple[str, ...], hidden: torch.Tensor) -> torch.Tensor:
    for path in paths:
        module = _optional(model, path)
        hidden = hidden if module is None else module(hidden)
    return hidden


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
    names: Layer,
    index: int,
    rows: _Rows,
    hidden: torch.Tensor,
    attend: Attention,
    pick: Pick | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    module, kind = layer.get_submodule, rows.kinds[index]
    inputs = _cast_once(_apply(layer, names.attention_residual.pre_norm, hidden))
    residual, query_inputs, mask = hidden, inputs, _visible(rows, module(names.attention))
    # OpenVINO 2026.4 rotates wrongly in fp32 where as many tokens are selected as there are heads (2026-11-30).
    late = pick is not None and kind in rows.rotations
    if pick is not None and not late:
        residual = pick(hidden[:, None])[:, 0]
        query_inputs = _apply(layer, names.attention_residual.pre_norm, residual)
        mask = pick(mask) if mask.shape[2] > 1 else mask
    query, key, value = _project(layer, names, rows, query_inputs, inputs)
    if kind in rows.rotations:
        query, key = (_rotate(part, *rows.rotations[kind]) for part in (query, key))
    if rows.key_heads != rows.heads:
        key, value = (part.repeat_interleave(rows.heads // rows.key_heads, dim=1) for part in (key, value))
    scale = getattr(module(names.attention), "scaling", query.shape[-1] ** -0.5)
    if rows.disentangled is not None:
        scale = (3 * query.shape[-1]) ** -0.5
        tables, columns = rows.disentangled
        mask = _add_bias(mask, _position_scores(*tables[str(index)], columns, query, key, pick) * scale)
    context, weights = attend(query, key, value, mask, _dropout(layer, names.attention_dropout), scale)
    context = context.transpose(1, 2).flatten(2)
    if pick is not None and late:
        context, residual = (pick(part[:, None])[:, 0] for part in (context, hidden))
    attended = _join(layer, names.attention_residual, module(names.output)(context), residual)
    return _join(layer, names.residual, _feed_forward(layer, names, attended), attended), weights


def _project(
    layer: nn.Module, names: Layer, rows: _Rows, query_inputs: torch.Tensor, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute queries, keys and values, float [R, heads, L, head dim]."""
    module = layer.get_submodule

    def split(values: torch.Tensor, heads: int, norm: str | None = None) -> torch.Tensor:
        values = values.view(*values.shape[:-1], heads, -1)
        return _apply(layer, norm, values).to(values.dtype).transpose(1, 2)

    if names.qkv is not None:
        query, key, value = module(names.qkv)(inputs).chunk(3, dim=-1)
        if query_inputs is not inputs:
            query = module(names.qkv)(query_inputs).chunk(3, dim=-1)[0]
        return split(query, rows.heads), split(key, rows.heads), split(value, rows.heads)
    return (
        split(module(names.query)(query_inputs), rows.heads, names.query_norm),
        split(module(names.key)(inputs), rows.key_heads, names.key_norm),
        split(module(names.value)(inputs), rows.key_heads),
    )


def _feed_forward(layer: nn.Module, names: Layer, attended: torch.Tensor) -> torch.Tensor:
    module = layer.get_submodule
    inputs = _apply(layer, names.residual.pre_norm, attended)
    if names.gate is None:
        inner = module(names.activation)(module(names.up)(inputs))
    else:
        fused = names.gate == names.up
        gate, up = module(names.up)(inputs).chunk(2, dim=-1) if fused else (module(names.gate)(inputs), None)
        inner = module(names.activation)(gate) * (module(names.up)(inputs) if up is None else up)
    return _apply(layer, names.down, _apply(layer, names.inner_dropout, inner))


def _apply(layer: nn.Module, path: str | None, values: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = values if path is None else layer.get_submodule(path)(values)
    return result


def _join(layer: nn.Module, names: Residual, output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Add a block's output to its input, with the modules around it."""
    output = _apply(layer, names.output_norm, _apply(layer, names.dropout, output))
    return _apply(layer, names.post_norm, output + residual)


def _dropout(layer: nn.Module, path: str) -> nn.Module:
    """Return the dropout of the probabilities, also where the family only states their probability."""
    found = operator.attrgetter(path)(layer)
    return found if isinstance(found, nn.Module) else nn.Dropout(found).train(layer.training)


def _cast_once(hidden: torch.Tensor) -> torch.Tensor:
    """Cast as autocast would, if it is on: once, instead of for each of the three projections."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def _rotate(values: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys [R, heads, L, head dim] by their positions, [R, 1, L, head dim]."""
    first, second = values.chunk(2, dim=-1)
    rotated = values * cosines + torch.cat((-second, first), dim=-1) * sines
    return rotated.to(values.dtype)


def _distances(length: int, device: torch.device) -> torch.Tensor:
    """Return how many slots each key is after each query, int64 [length, length]."""
    slots = torch.arange(length, device=device)
    return slots[None, :] - slots[:, None]


def _visible(rows: _Rows, attention: nn.Module) -> torch.Tensor:
    """Return the mask of a layer: its attention may not see later keys, or keys outside its window."""
    causal, window = bool(getattr(attention, "is_causal", False)), getattr(attention, "sliding_window", None)
    if not causal and window is None:
        return rows.mask
    if (causal, window) not in rows.masks:
        length = rows.mask.shape[-1]
        distances = _distances(length, rows.mask.device)
        seen = distances < (1 if causal else length)
        if window is not None:
            seen = seen & (distances.abs() < window)
        # Every query sees itself: padding far behind its text would see nothing.
        rows.masks[causal, window] = (
            (rows.mask & seen) | (distances == 0)
            if rows.mask.dtype is torch.bool
            else torch.where(seen, rows.mask, BLOCKED)
        )
    return rows.masks[causal, window]


def _distance_columns(model: Any, family: Family, length: int) -> torch.Tensor:
    """Return the column of DeBERTa's tables of distances for each pair of slots, int64 [length, length]."""
    config, table = model.config, model.get_submodule(family.disentangled).weight
    furthest = max(config.max_relative_positions, 0) or config.max_position_embeddings
    span = len(table) // 2
    # A constant of the graph, as in `_relative_bias`.
    size = getattr(config, "position_buckets", 0)
    buckets = [disentangled_bucket(distance, size, furthest) for distance in range(-furthest, furthest + 1)]
    columns = torch.tensor([min(max(bucket + span, 0), 2 * span - 1) for bucket in buckets], device=table.device)
    before = (-_distances(length, table.device)).clamp(-furthest, furthest)
    return columns[before + furthest]


def _position_scores(
    position_keys: torch.Tensor,
    position_queries: torch.Tensor,
    columns: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    pick: Pick | None,
) -> torch.Tensor:
    """Return the scores of text with position and of position with text, [R, heads, queries, L] (DeBERTa, section 3.1).

    Both read the same column of their table: buckets are odd functions of the distance.
    """
    columns = columns.expand(len(query), 1, -1, -1)
    columns = (columns if pick is None else pick(columns)).expand(-1, query.shape[1], -1, -1)
    to_position = torch.matmul(query, position_keys).gather(-1, columns)
    by_key = torch.matmul(key, position_queries).gather(-1, columns.transpose(2, 3))
    return to_position + by_key.transpose(2, 3)


def _relative_bias(table: nn.Module, length: int, device: torch.device) -> torch.Tensor:
    """Return the bias by the distance of two slots, query before key: float [1, heads, length, length]."""
    # A constant of the graph: buckets come from a rounded logarithm, which engines may round differently.
    buckets = torch.tensor(
        [relative_bucket(distance) for distance in range(-MAX_DISTANCE, MAX_DISTANCE + 1)], device=device
    )
    distances = _distances(length, device).clamp(-MAX_DISTANCE, MAX_DISTANCE)
    of_distance = table(buckets)
    bias: torch.Tensor = nn.functional.embedding(distances + MAX_DISTANCE, of_distance).permute(2, 0, 1)[None]
    return bias


def disentangled_bucket(distance: int, size: int, furthest: int) -> int:
    """Return DeBERTa's bucket of a key `distance` tokens before the query: `size` of them, 0 for one a distance.

    Distances up to half of `size` have a bucket each, larger ones share buckets whose limits grow by a factor.
    """
    half, reach = size // 2, abs(distance)
    if size <= 0 or reach <= half:
        return distance
    bucket = math.ceil(math.log(reach / half) / math.log((furthest - 1) / half) * (half - 1)) + half
    return bucket if distance > 0 else -bucket


def relative_bucket(distance: int) -> int:
    """Return the row of the bias table of MPNet and T5 for a key `distance` tokens after the query.

    The table has 16 rows for keys at or before the query, then 16 for later ones. Distances below 8 have one row each;
    larger ones share 8 rows whose limits grow by the square root of 2.
    """
    size = abs(distance)
    row = size if size < 8 else min(15, 7 + (size * size // 64).bit_length())
    return row + 16 if distance > 0 else row
