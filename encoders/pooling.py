"""The reference definition of every head in PyTorch: token vectors of padded texts, one a row, to one vector a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from encoders.rerankers import SCORE_HEADS
from encoders.sentence_transformers import WEIGHTS_FILE
from mirror_runtime.bundle import Activation, Dense, EncoderSpec, Pooling, VectorType
from mirror_runtime.errors import BundleError

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    Activation.IDENTITY: nn.Identity,
    Activation.TANH: nn.Tanh,
    Activation.RELU: nn.ReLU,
    Activation.GELU: nn.GELU,
}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The transformer's output for a batch."""

    # Of the embeddings and of each layer, float [batch, length, width]; Hugging Face's `hidden_states`
    states: Sequence[torch.Tensor]
    mask: torch.Tensor  # int [batch, length], 1 on the text's tokens, including special tokens and template
    # bool [batch, length], True on the template's mask token; None unless the pooling is `mask`
    marked: torch.Tensor | None = None
    # Probabilities of Ditto's head, float [batch, length, length], query before key; None unless the pooling is `ditto`
    attention: torch.Tensor | None = None


def pool(tokens: Tokens, spec: EncoderSpec) -> torch.Tensor:
    """Average layers and pool token vectors into one vector a text, as `Pooling` defines.

    Returns:
        float [batch, width], before dense layers, cut and normalisation. For `tokens` [tokens of the batch, width],
        text after text, without padding.

    Raises:
        ValueError: `mean_padded` with another length than `pad_to`, which would be another vector; or `tokens` lacks
            an input of the pooling.
    """
    hidden = torch.stack([tokens.states[layer] for layer in spec.layers]).mean(dim=0)
    if spec.per_token:
        return hidden[tokens.mask.bool()]
    if spec.pooling in (Pooling.CLS, Pooling.RERANK):
        return hidden[:, 0]
    if spec.pooling is Pooling.LAST:
        return hidden[torch.arange(len(hidden)), tokens.mask.sum(dim=1) - 1]
    if spec.pooling is Pooling.MASK:
        if tokens.marked is None or not (tokens.marked.sum(dim=1) == 1).all():
            raise ValueError("mask pooling needs one marked token a text")
        return hidden[tokens.marked]
    if spec.pooling is Pooling.MAX:
        return hidden.masked_fill(~tokens.mask.bool().unsqueeze(-1), float("-inf")).amax(dim=1)
    weights = _weights(tokens, spec).unsqueeze(-1)
    # The vector of a text without tokens, which only a static encoder has, is zero.
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=torch.finfo(weights.dtype).tiny)


def _weights(tokens: Tokens, spec: EncoderSpec) -> torch.Tensor:
    """Return the token weights of a mean, float [batch, length]."""
    mask = tokens.mask.float()
    if spec.pooling is Pooling.MEAN_PADDED:
        if mask.shape[1] != spec.pad_to:
            raise ValueError(f"mean_padded over {mask.shape[1]} positions, but pad_to is {spec.pad_to}")
        return torch.ones_like(mask)
    if spec.pooling is Pooling.WEIGHTED_MEAN:
        return mask * torch.arange(1, mask.shape[1] + 1)
    if spec.pooling is Pooling.DITTO:
        if tokens.attention is None:
            raise ValueError("ditto needs its head's attention")
        return mask * tokens.attention.diagonal(dim1=1, dim2=2)
    return mask


def project(pooled: torch.Tensor, dense: Iterable[nn.Module]) -> torch.Tensor:
    """Apply dense layers, float [batch, width] in and out."""
    for layer in dense:
        pooled = layer(pooled)
    return pooled


def finish(pooled: torch.Tensor, dense: Sequence[nn.Module], spec: EncoderSpec) -> torch.Tensor:
    """Apply dense layers, cut to `dim` components (Matryoshka), and normalise if `spec.normalize` is set."""
    cut = project(pooled, dense)[:, : spec.dim]
    return torch.nn.functional.normalize(cut, dim=1) if spec.normalize else cut


def rounded(vectors: torch.Tensor, spec: EncoderSpec) -> torch.Tensor:
    """Round components to the values that the vector type can represent, as float32: 1 and -1 for bits."""
    if spec.vector_type is VectorType.FLOAT16:
        return vectors.half().float()
    if spec.vector_type is VectorType.INT8:
        scale = torch.tensor(spec.int8_scale)
        return (vectors / scale).round().clamp(-127, 127) * scale
    if spec.vector_type is VectorType.BINARY:
        return torch.where(vectors > 0, 1.0, -1.0)
    return vectors


def make_dense(dense: Dense, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Sequential:
    """Build a dense layer of the head: element 0 is the linear part, element 1 the activation."""
    linear = nn.Linear(dense.in_features, dense.out_features, bias=dense.bias)
    state = {"weight": weight.detach().float()} | ({} if bias is None else {"bias": bias.detach().float()})
    linear.load_state_dict(state)
    return nn.Sequential(linear, ACTIVATIONS[dense.activation]()).requires_grad_(False).eval()


def load_dense(dense: Dense, folder: Path) -> nn.Sequential:
    """Load a dense layer of the head from its folder in a sentence-transformers folder.

    Raises:
        BundleError: the weights are missing, pickled, truncated, or not of the recorded shapes.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (
            " (pytorch_model.bin is never opened: it can run code)" if (folder / "pytorch_model.bin").is_file() else ""
        )
        raise BundleError(f"{path} is missing{pickled}: save the module again with safetensors")
    try:
        weights = load_file(path)
        return make_dense(dense, weights["linear.weight"], weights.get("linear.bias"))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise BundleError(f"{path} does not hold a dense layer of the recorded shape: {error}") from error


def linear_layers(model: PreTrainedModel) -> tuple[nn.Linear, ...]:
    """Return the layers that `score_layers` describes from a loaded classification model."""
    head = SCORE_HEADS[model.config.model_type]
    hidden, score = model.get_submodule(head.hidden), model.get_submodule(head.score)
    assert isinstance(hidden, nn.Linear)
    assert isinstance(score, nn.Linear)
    return hidden, score
