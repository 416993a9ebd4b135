"""Static encoders: a table of token vectors whose mean is the text's vector, as two libraries publish them.

sentence-transformers' `StaticEmbedding` averages all tokens of a text. model2vec leaves the unknown token out. Neither
adds special tokens, so a text may have none: its mean is zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from encoders.sentence_transformers import WEIGHTS_FILE
from encoders.static_folder import MODEL2VEC, TABLES, table_width
from mirror_runtime.errors import BundleError


class StaticConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes of a static encoder."""

    model_type = "static"


class Model2VecConfig(StaticConfig):  # type: ignore[no-untyped-call]
    """The same of an encoder that leaves the unknown token out."""

    model_type = MODEL2VEC


class StaticModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A table of token vectors, with the interface of an encoder without layers."""

    config_class = StaticConfig

    def __init__(self, table: torch.Tensor, config: type[StaticConfig] = StaticConfig) -> None:
        sizes: dict[str, Any] = {"hidden_size": table.shape[1], "vocab_size": len(table)}
        sizes |= {"num_hidden_layers": 0, "num_attention_heads": 1}
        super().__init__(config(**sizes))
        self.embedding = nn.Embedding(len(table), table.shape[1], _weight=table, _freeze=True)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table."""
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Look up int64 [batch, length]; returns float32 [batch, length, width]."""
        vectors = self.embedding(input_ids)
        return BaseModelOutput(last_hidden_state=vectors, hidden_states=(vectors,))


def load_static_model(folder: Path, family: str) -> PreTrainedModel:
    """Load the table as fp32 [tokens, width], times the tokens' weights if there are any.

    model2vec may store fewer vectors than there are tokens, and each token's row of them (`mapping`).

    Raises:
        BundleError: the file holds no table, or one of another data type.
    """
    table_width(folder)  # raises where there is no table
    weights = load_file(folder / WEIGHTS_FILE)
    table = next(weights[name] for name in TABLES if name in weights)
    if not (table.dtype.is_floating_point or table.dtype is torch.int8):
        raise BundleError(f"{folder / WEIGHTS_FILE} holds a table of {table.dtype}: it must be floating point or int8")
    if "mapping" in weights:
        table = table[weights["mapping"].long()]
    if "weights" in weights:
        table = table.float() * weights["weights"].float()[:, None]
    model = StaticModel(table.float().contiguous(), Model2VecConfig if family == MODEL2VEC else StaticConfig)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def load_static_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap the tokenizer of a static encoder, without the special tokens that it would add to a text."""
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token for what a vocabulary lacks; None if it has none."""
    model: Any = tokenizer.model
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)
    found: int | None = json.loads(tokenizer.to_str())["model"].get("unk_id")  # Unigram states no name
    return found
