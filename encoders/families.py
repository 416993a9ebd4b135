"""The supported families of transformers, one description each; what is not a name or a flag is in `encoders.layers`.

The families share their arithmetic (attention, residual, LayerNorm, feed-forward, residual, LayerNorm; see
`encoders.layers`). They differ in module names, in position ids and in what is added to the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """A family's names for the modules of a layer, relative to the layer."""

    query: str  # projection; `key` and `value` likewise
    key: str
    value: str
    attention_dropout: str  # on the attention probabilities
    output: str  # projection after the heads
    output_dropout: str | None  # after `output`; None if the family has none
    output_norm: str  # LayerNorm after the first residual
    up: str = "intermediate.dense"  # first projection of the feed-forward block
    activation: str = "intermediate.intermediate_act_fn"  # between both projections
    down: str = "output.dense"  # second projection
    down_dropout: str = "output.dropout"  # after `down`
    down_norm: str = "output.LayerNorm"  # LayerNorm after the second residual


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of encoders, as data."""

    names: LayerNames  # of a layer's modules
    layers: str = "encoder.layer"  # path of the model's list of layers
    token_types: bool = False  # the tokenizer returns token types, so the padded graph has them as an input
    # Positions start after the padding token's row of the table, and padding is not counted.
    skips_padding: bool = False
    padding_row: int | None = None  # that row if the family fixes it; None if it is the configuration's `pad_token_id`
    relative_bias: bool = False  # attention scores get a bias by the distance of two tokens, the same in all layers
    dim: str = "hidden_size"  # the configuration's key for the width of a vector

    def first_position(self, config: Mapping[str, Any]) -> int:
        """Return the row of the position table for the first token of a text.

        Args:
            config: content of `config.json`.
        """
        if not self.skips_padding:
            return 0
        return 1 + (config.get("pad_token_id", 1) if self.padding_row is None else self.padding_row)


BERT_NAMES = LayerNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_dropout="attention.self.dropout",
    output="attention.output.dense",
    output_dropout="attention.output.dropout",
    output_norm="attention.output.LayerNorm",
)

DISTILBERT_NAMES = LayerNames(
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

MPNET_NAMES = LayerNames(
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
"""The families whose packed rows and graphs the tests prove, by `model_type`."""
