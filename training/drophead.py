"""DropHead: drop whole attention heads at random, drawn for each text (Mirror-BERT section 4, after Zhou et al.).

It scales the output of the heads before the layer's output projection, so it needs no attention probabilities and works
with every attention. In packed rows each text has its own draw, as if it were alone in its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from encoders.layers import layer_names, layers_of


class DropHead:
    """The forward pre-hook of `drop_heads`."""

    text_ids: torch.Tensor  # int64 [rows, length], the text of each slot in the next forward pass

    def __init__(self, rate: float, heads: int) -> None:
        self.rate = rate
        self.heads = heads

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Scale the heads of a layer. PyTorch calls this before the output projection."""
        if not module.training:
            return None
        (context,) = inputs
        scales = head_scales(int(self.text_ids.max()) + 1, self.heads, self.rate, context.device).to(context.dtype)
        by_slot = scales[self.text_ids.to(context.device)].unsqueeze(-1)
        return ((context.view(*by_slot.shape[:-1], -1) * by_slot).flatten(-2),)


def head_scales(texts: int, heads: int, rate: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw the factor of each head of each text, float32 [texts, heads].

    Heads stay with probability 1 - `rate`, independently; those that stay are scaled by heads / staying heads. A text
    that would lose all its heads keeps all of them; the published code divides by zero then.
    """
    stays = torch.rand(texts, heads, device=device) >= rate
    stays |= ~stays.any(dim=1, keepdim=True)
    return stays * (heads / stays.sum(dim=1, keepdim=True))


@contextmanager
def drop_heads(model: PreTrainedModel, rate: float) -> Iterator[DropHead | None]:
    """Drop heads in every layer of a model in training mode while the block runs.

    Yields:
        The hook, whose `text_ids` must be set before each forward pass; None if `rate` is 0.
    """
    if rate == 0:
        yield None
        return
    config: Any = model.config
    hook = DropHead(rate, config.num_attention_heads)
    outputs = {layer.get_submodule(layer_names(model).output) for layer in layers_of(model)}  # layers may share one
    handles = [output.register_forward_pre_hook(hook) for output in outputs]
    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()
