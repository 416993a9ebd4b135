"""Static encoders: a table of token vectors whose mean is the text's vector, as two libraries publish them.

sentence-transformers' `StaticEmbedding` averages all tokens of a text. model2vec leaves the unknown token out. Neither
adds special tokens, so a text may have none: its mean is zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from encoders.pooling import WEIGHTS_FILE
from encoders.sentence_transformers import RecordedEncoder, read_json
from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import BundleError

TABLES = ("embedding.weight", "embeddings")
"""Names of the table: sentence-transformers' and model2vec's."""

MODEL2VEC_TOKENS = 512
"""model2vec's limit where its config.json states none."""


class StaticConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes of a static encoder."""

    model_type = "static"


class Model2VecConfig(StaticConfig):  # type: ignore[no-untyped-call]
    """The same of an encoder that leaves the unknown token out."""

    model_type = "model2vec"


class StaticModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A table of token vectors, with the interface of an encoder without layers."""

    config_class = StaticConfig

    def __init__(self, config: StaticConfig, table: torch.Tensor) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(len(table), table.shape[1], _weight=table, _freeze=True)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table."""
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Look up int64 [batch, length]; returns float32 [batch, length, width]."""
        vectors = self.embedding(input_ids)
        return BaseModelOutput(last_hidden_state=vectors, hidden_states=(vectors,))


def is_model2vec(folder: Path) -> bool:
    """Return whether model2vec wrote a folder."""
    path = folder / "config.json"
    return path.is_file() and read_json(path, dict).get("model_type") == Model2VecConfig.model_type


def read_model2vec(folder: Path) -> RecordedEncoder:
    """Read what a model2vec folder records.

    Raises:
        BundleError: its limit is not a number of tokens.
    """
    config = read_json(folder / "config.json", dict)
    limit = config.get("max_length", MODEL2VEC_TOKENS)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise BundleError(f"{folder}/config.json has max_length {limit!r}: it must be a number of tokens")
    return RecordedEncoder(
        folder=folder,
        pooling=Pooling.MEAN,
        dense=(),
        dense_folders=(),
        normalize=bool(config.get("normalize", False)),
        max_tokens=limit,
        dim=None,
        template=None,
        takes_prompt=True,
        family=Model2VecConfig.model_type,
    )


def table_width(folder: Path) -> int:
    """Return the components of a token's vector.

    Raises:
        BundleError: the file holds no table.
    """
    with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
        names = list(weights.keys())
        shape: list[int] = next((weights.get_slice(name).get_shape() for name in TABLES if name in names), [])
    if len(shape) != 2:
        raise BundleError(
            f"{folder / WEIGHTS_FILE} holds {', '.join(names)} and no table of token vectors ({' or '.join(TABLES)})"
        )
    return shape[1]


def load_static_model(folder: Path, family: str) -> PreTrainedModel:
    """Load the table as fp32 [tokens, width], times the tokens' weights if there are any.

    model2vec may store fewer vectors than there are tokens, and each token's row of them (`mapping`).

    Raises:
        BundleError: the file holds no table, or one of another data type.
    """
    width, weights = table_width(folder), load_file(folder / WEIGHTS_FILE)
    table = next(weights[name] for name in TABLES if name in weights)
    if not (table.dtype.is_floating_point or table.dtype is torch.int8):
        raise BundleError(f"{folder / WEIGHTS_FILE} holds a table of {table.dtype}: it must be floating point or int8")
    if "mapping" in weights:
        table = table[weights["mapping"].long()]
    if "weights" in weights:
        table = table.float() * weights["weights"].float()[:, None]
    kind = Model2VecConfig if family == Model2VecConfig.model_type else StaticConfig
    sizes: dict[str, Any] = {"hidden_size": width, "vocab_size": len(table)}
    sizes |= {"num_hidden_layers": 0, "num_attention_heads": 1}
    model = StaticModel(kind(**sizes), table.float().contiguous())
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
