"""Dropout whose masks are cheap to draw on a CPU, and attention with it.

PyTorch draws a CPU dropout mask one Bernoulli variate at a time in one thread, which took a fifth to a quarter of a
tuning step. Here one 64-bit draw of the same generator decides four elements, against a threshold of 16 bits: the
effective probability is within 1/131072 of the requested one, and the scale uses the effective one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from encoders.layers import fused_attention, layer_names, layers_of

LEVELS = 2**16


class WordDropout(nn.Module):
    """`torch.nn.Dropout` for CPU tensors: see `word_dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Zero elements at random and scale the others, in training mode only; shape and dtype stay."""
        return word_dropout(values, self.p) if self.training else values


def word_dropout(values: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element with probability `p`, independently, and divide the others by the probability of staying.

    The probability, 0 to below 1, is rounded to a multiple of 1/65536; torch's global generator draws.
    """
    dropped = min(round(p * LEVELS), LEVELS - 1)
    if dropped == 0:
        return values
    count = values.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    keep = words.view(torch.int16)[:count].view(values.shape) >= dropped - LEVELS // 2
    result: torch.Tensor = _Dropped.apply(values, keep, LEVELS / (LEVELS - dropped))  # type: ignore[no-untyped-call]
    return result


class _Dropped(torch.autograd.Function):
    """Multiply by a mask and a number. The mask has the values' type, and the second product needs no new memory."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        mask = keep.to(values.dtype)
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (values * mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (gradient * mask).mul_(ctx.scale), None, None


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: nn.Module, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with word dropout on the probabilities if the layer has it, else fused. An `encoders.layers.Attention`.

    Scores and probabilities keep the type of `query`: autocast would cast them to fp32 and back.
    """
    if not (isinstance(dropout, WordDropout) and dropout.training):
        return fused_attention(query, key, value, mask, dropout, scale)
    with torch.autocast("cpu", enabled=False):
        scores = torch.matmul(query * scale, key.transpose(2, 3))
        if mask.dtype is torch.bool:
            scores = scores.masked_fill_(~mask, float("-inf"))
        else:
            scores = scores + mask.to(scores.dtype)
        return torch.matmul(word_dropout(scores.softmax(dim=-1), dropout.p), value), None


@contextmanager
def set_dropout(model: PreTrainedModel, p: float) -> Iterator[None]:
    """Replace every dropout of a model by one of probability `p` while the block runs, on a CPU by word dropout."""
    places = [(parent, name) for parent in model.modules() for name, _ in parent.named_children()]
    path, _, name = layer_names(model).attention_dropout.rpartition(".")
    places += [(layer.get_submodule(path), name) for layer in layers_of(model)]  # some families state a number there
    before = {place: getattr(*place) for place in places}
    dropouts = {place: found for place, found in before.items() if isinstance(found, (nn.Dropout, float, int))}
    for (parent, name), found in dropouts.items():
        replacement = WordDropout(p) if model.device.type == "cpu" else nn.Dropout(p)
        setattr(parent, name, replacement.train(getattr(found, "training", parent.training)))
    try:
        yield
    finally:
        for (parent, name), found in dropouts.items():
            if not isinstance(found, nn.Module):
                delattr(parent, name)  # PyTorch refuses a number in place of a module
            setattr(parent, name, found)
