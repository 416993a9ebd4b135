"""The supported families of transformers, as data: what a layer is made of, and the family's names for its modules.

`encoders.layers` runs any encoder that these parts describe. What transformers' own modules state (biases, activation,
eps, scaling of the scores, causal attention, a window) is read from the modules and not repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Modules around attention or feed-forward, relative to the layer; None where the family has none there."""

    pre_norm: str | None = None  # before the block, on its input only
    dropout: str | None = None  # after the block
    output_norm: str | None = None  # after that, before the sum with the block's input
    post_norm: str | None = None  # after that sum


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A family's names for the modules of a layer, relative to the layer."""

    attention: str = ""  # its module; what it states of `scaling`, `is_causal` and `sliding_window` is obeyed
    query: str = ""  # projection; `key` and `value` likewise
    key: str = ""
    value: str = ""
    qkv: str | None = None  # one projection in place of these three
    query_norm: str | None = None  # on each head's query; `key_norm` likewise
    key_norm: str | None = None
    attention_dropout: str = ""  # on the attention probabilities: a module, or an attribute with the probability
    output: str = ""  # projection after the heads
    attention_residual: Residual = Residual()
    up: str = "intermediate.dense"  # first projection of the feed-forward block
    gate: str | None = None  # its activation is multiplied by `up`; the same name: one module yields gate, then up
    activation: str = "intermediate.intermediate_act_fn"  # between both projections
    inner_dropout: str | None = None  # before `down`
    down: str = "output.dense"  # second projection
    residual: Residual = Residual(dropout="output.dropout", post_norm="output.LayerNorm")  # of the feed-forward block
    position_dropout: str | None = None  # on disentangled positions; their projections are those of the text unless
    position_key: str | None = None  # the layer has these modules
    position_query: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of encoders, as data. Paths of modules are relative to the model."""

    layer: Layer
    layers: str | None = "encoder.layer"  # the list of layers; None: a static encoder, which has none
    group: str | None = None  # that list holds groups, with their layers here, which several places share
    flagged: tuple[str, Layer] | None = None  # a layer has these names instead if this key of the configuration is set
    words: str = "embeddings.word_embeddings"
    types: str | None = "embeddings.token_type_embeddings"  # table of token types, if the model has one
    # Table of positions, if the model has one.
    positions: str | None = "embeddings.position_embeddings"
    # Positions start after the padding token's row of the table, and padding is not counted.
    skips_padding: bool = False
    padding_row: int | None = None  # that row if the family fixes it; None if it is the configuration's `pad_token_id`
    embedding_steps: tuple[str, ...] = ("embeddings.LayerNorm", "embeddings.dropout")  # those that the model has
    last_steps: tuple[str, ...] = ()  # after the last layer
    rotary: str | None = None  # module with the frequencies of rotary positions
    relative_bias: str | None = None  # table of a bias by the distance of two tokens, the same in all layers
    disentangled: str | None = None  # table of distances, for scores of text with position (DeBERTa)
    disentangled_norm: str | None = None  # on that table, if the model has it
    token_types: bool = False  # the tokenizer returns token types, so the padded graph has them as an input
    windowed: bool = False  # some layers attend within a window, which their modules state
    dim: str = "hidden_size"  # the configuration's key for the width of a vector
    longest: str | None = "max_position_embeddings"  # its key for the number of positions; None: any length
    drops_unknown: bool = False  # the tokenizer's unknown token does not count among a text's tokens
    is_language_model: bool = False  # repositories of the family name a causal language model, whose head is not used
    loader: str = "AutoModel"  # class of transformers
    # Values that keys of `config.json` may have, None if the key may be missing. Others mean parts that no description
    # states.
    requires: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    @property
    def is_static(self) -> bool:
        """Whether the encoder is a table of token vectors and nothing else: see `encoders.static`."""
        return self.layers is None

    def first_position(self, config: Mapping[str, Any]) -> int:
        """Return the row of the position table for the first token of a text.

        Args:
            config: content of `config.json`.
        """
        if not self.skips_padding:
            return 0
        return 1 + (config.get("pad_token_id", 1) if self.padding_row is None else self.padding_row)


ABSOLUTE: Mapping[str, tuple[object, ...]] = {"position_embedding_type": ("absolute", None)}

BERT_LAYER = Layer(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_dropout="attention.self.dropout",
    output="attention.output.dense",
    attention_residual=Residual(dropout="attention.output.dropout", post_norm="attention.output.LayerNorm"),
)

DISTILBERT_LAYER = Layer(
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_dropout="attention.dropout",
    output="attention.out_lin",
    attention_residual=Residual(post_norm="sa_layer_norm"),
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    residual=Residual(dropout="ffn.dropout", post_norm="output_layer_norm"),
)

MPNET_LAYER = Layer(
    attention="attention.attn",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_dropout="attention.attn.dropout",
    output="attention.attn.o",
    attention_residual=Residual(dropout="attention.dropout", post_norm="attention.LayerNorm"),
)

ALBERT_LAYER = Layer(
    attention="attention",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    attention_dropout="attention.attention_dropout",
    output="attention.dense",
    attention_residual=Residual(dropout="attention.output_dropout", post_norm="attention.LayerNorm"),
    up="ffn",
    activation="activation",
    down="ffn_output",
    residual=Residual(post_norm="full_layer_layer_norm"),
)

ROTARY_POST_NORM = Layer(
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_dropout="self_attn.attention_dropout",
    output="self_attn.o_proj",
    attention_residual=Residual(dropout="post_attention_dropout", post_norm="post_attention_layernorm"),
    up="mlp.up_proj",
    gate="mlp.gate_proj",
    activation="mlp.act_fn",
    down="mlp.down_proj",
    residual=Residual(dropout="post_mlp_dropout", post_norm="post_mlp_layernorm"),
)

MODERNBERT_LAYER = Layer(
    attention="attn",
    qkv="attn.Wqkv",
    attention_dropout="attn.attention_dropout",
    output="attn.Wo",
    attention_residual=Residual(pre_norm="attn_norm", dropout="attn.out_drop"),
    up="mlp.Wi",
    gate="mlp.Wi",
    activation="mlp.act",
    inner_dropout="mlp.drop",
    down="mlp.Wo",
    residual=Residual(pre_norm="mlp_norm"),
)

ROTARY_PRE_NORM = replace(
    ROTARY_POST_NORM,
    attention_residual=Residual(pre_norm="input_layernorm"),
    residual=Residual(pre_norm="post_attention_layernorm"),
)

QWEN3_LAYER = replace(ROTARY_PRE_NORM, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")

GEMMA3_LAYER = replace(
    QWEN3_LAYER,
    attention_residual=Residual(pre_norm="input_layernorm", output_norm="post_attention_layernorm"),
    residual=Residual(pre_norm="pre_feedforward_layernorm", output_norm="post_feedforward_layernorm"),
)

T5_LAYER = Layer(
    attention="layer.0.SelfAttention",
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    attention_dropout="layer.0.SelfAttention.dropout",
    output="layer.0.SelfAttention.o",
    attention_residual=Residual(pre_norm="layer.0.layer_norm", dropout="layer.0.dropout"),
    up="layer.1.DenseReluDense.wi",
    activation="layer.1.DenseReluDense.act",
    inner_dropout="layer.1.DenseReluDense.dropout",
    down="layer.1.DenseReluDense.wo",
    residual=Residual(pre_norm="layer.1.layer_norm", dropout="layer.1.dropout"),
)

DEBERTA_LAYER = replace(
    BERT_LAYER,
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    position_dropout="attention.self.pos_dropout",
    position_key="attention.self.pos_key_proj",
    position_query="attention.self.pos_query_proj",
)

STATIC = Family(
    layer=Layer(), layers=None, words="embedding", types=None, positions=None, embedding_steps=(), longest=None
)

BERT = Family(layer=BERT_LAYER, token_types=True, requires=ABSOLUTE)
ROBERTA = Family(layer=BERT_LAYER, skips_padding=True, requires=ABSOLUTE)
LANGUAGE_MODEL = Family(
    layer=QWEN3_LAYER,
    layers="layers",
    words="embed_tokens",
    types=None,
    positions=None,
    embedding_steps=(),
    last_steps=("norm",),
    rotary="rotary_emb",
    is_language_model=True,
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": BERT,
        "roberta": ROBERTA,
        "xlm-roberta": ROBERTA,
        "camembert": ROBERTA,
        "distilbert": Family(layer=DISTILBERT_LAYER, layers="transformer.layer", dim="dim"),
        "electra": Family(
            layer=BERT_LAYER,
            embedding_steps=("embeddings.LayerNorm", "embeddings.dropout", "embeddings_project"),
            token_types=True,
            requires=ABSOLUTE,
        ),
        "mpnet": Family(
            layer=MPNET_LAYER, skips_padding=True, padding_row=1, relative_bias="encoder.relative_attention_bias"
        ),
        "ernie": BERT,
        "albert": Family(
            layer=ALBERT_LAYER,
            layers="encoder.albert_layer_groups",
            group="albert_layers",
            embedding_steps=(*BERT.embedding_steps, "encoder.embedding_hidden_mapping_in"),
            token_types=True,
        ),
        "nomic_bert": Family(
            layer=ROTARY_POST_NORM, layers="layers", positions=None, rotary="rotary_emb", token_types=True
        ),
        "modernbert": Family(
            layer=MODERNBERT_LAYER,
            layers="layers",
            words="embeddings.tok_embeddings",
            types=None,
            positions=None,
            embedding_steps=("embeddings.norm", "embeddings.drop"),
            last_steps=("final_norm",),
            rotary="rotary_emb",
            windowed=True,
        ),
        "gte": Family(
            layer=replace(ROTARY_POST_NORM, inner_dropout="mlp.dropout"),
            layers="layers",
            positions=None,
            rotary="rotary_emb",
        ),
        "eurobert": replace(LANGUAGE_MODEL, layer=ROTARY_PRE_NORM, is_language_model=False),
        "qwen3": LANGUAGE_MODEL,
        "gemma3_text": replace(LANGUAGE_MODEL, layer=GEMMA3_LAYER, windowed=True),
        "t5": Family(
            layer=T5_LAYER,
            flagged=(
                "is_gated_act",
                replace(T5_LAYER, up="layer.1.DenseReluDense.wi_1", gate="layer.1.DenseReluDense.wi_0"),
            ),
            layers="encoder.block",
            words="encoder.embed_tokens",
            types=None,
            positions=None,
            embedding_steps=("encoder.dropout",),
            last_steps=("encoder.final_layer_norm", "encoder.dropout"),
            relative_bias="encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
            dim="d_model",
            longest=None,
            loader="T5EncoderModel",
            requires={"relative_attention_num_buckets": (32,), "relative_attention_max_distance": (128, None)},
        ),
        "jina_embeddings_v3": Family(
            layer=replace(ROTARY_POST_NORM, up="mlp.fc1", gate=None, activation="mlp.activation_fn", down="mlp.fc2"),
            layers="layers",
            positions=None,
            rotary="rotary_emb",
        ),
        "deberta-v2": Family(
            layer=DEBERTA_LAYER,
            embedding_steps=("embeddings.embed_proj", *BERT.embedding_steps),
            disentangled="encoder.rel_embeddings",
            disentangled_norm="encoder.LayerNorm",
            requires={
                "relative_attention": (True,),
                "pos_att_type": ("p2c|c2p", "c2p|p2c", ["p2c", "c2p"], ["c2p", "p2c"]),
            },
        ),
        "static": STATIC,
        "model2vec": replace(STATIC, drops_unknown=True),
    }
)
"""The families whose packed rows and graphs the tests prove, by `model_type`."""
