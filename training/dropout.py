"""Dropout whose masks are cheap to draw on a CPU.

PyTorch draws a CPU dropout mask one Bernoulli variate at a time in one thread, which was a fifth to a quarter of a
tuning step. Here one 64-bit draw of the same generator decides four elements, against a threshold of 16 bits: the
probability is met to 1/131072, and the scale uses the probability that is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "mirror_cpu_dropout"
"""The name under which transformers knows our attention."""

LEVELS = 2**16


class WordDropout(nn.Module):
    """`torch.nn.Dropout` for CPU tensors, drawing from torch's global generator.

    Args:
        p: probability that an element is zeroed, 0 to below 1; rounded to a multiple of 1/65536.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Zero elements at random and scale the others, in training mode alone; shape and dtype stay."""
        return word_dropout(values, self.p) if self.training else values


def word_dropout(values: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element with probability `p`, independently, and divide the others by the probability of staying.

    Args:
        values: any shape, floating, on the CPU.
        p: 0 to below 1; rounded to a multiple of 1/65536.
    """
    dropped = min(round(p * LEVELS), LEVELS - 1)
    if dropped == 0:
        return values
    count = values.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    keep = words.view(torch.int16)[:count].view(values.shape) >= dropped - LEVELS // 2
    return values * keep * (LEVELS / (LEVELS - dropped))


@contextmanager
def set_dropout(model: PreTrainedModel, p: float) -> Iterator[None]:
    """Give every dropout of a model the probability `p` while the block runs, in the fast form on a CPU."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    dropouts = [(parent, name, child) for parent, name, child in found if isinstance(child, nn.Dropout)]
    # transformers 4 keeps attention's probability as a number of the layer, and its layers ignore the name set below.
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "dropout_prob")]
    numbers = [layer.dropout_prob for layer in layers]
    attention = model.config._attn_implementation
    on_cpu = model.device.type == "cpu"
    for parent, name, child in dropouts:
        replacement = WordDropout(p) if on_cpu else nn.Dropout(p)
        setattr(parent, name, replacement.train(child.training))
    for layer in layers:
        layer.dropout_prob = p
    if on_cpu:
        AttentionInterface.register(ATTENTION, _attend)
        model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for parent, name, child in dropouts:
            setattr(parent, name, child)
        for layer, number in zip(layers, numbers, strict=True):
            layer.dropout_prob = number
        model.config._attn_implementation = attention


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as `scaled_dot_product_attention` does, in the form that transformers calls.

    Args:
        module: the layer; not used.
        query: float [rows, heads, length, head dim]; `key` and `value` likewise.
        key: see `query`.
        value: see `query`.
        attention_mask: bool [rows, 1, length, length]; every query has at least one key.
        dropout: on the attention probabilities; 0 outside training.
        scaling: of the scores.

    Returns:
        float [rows, length, heads, head dim], and no probabilities.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = word_dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None
