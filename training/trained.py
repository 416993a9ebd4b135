"""What is trained: the whole model, its last layers, or low-rank additions to their linear layers (LoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from encoders.layers import layers_of
from mirror_runtime.errors import InputError

SCALE = 2.0
"""Factor of the low-rank product: alpha / rank of the paper, with the usual alpha of twice the rank."""


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices, which is zero at first (LoRA section 4.1)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        place: dict[str, Any] = {"device": base.weight.device, "bias": False}
        self.down = nn.Linear(base.in_features, rank, **place)
        self.up = nn.Linear(rank, base.out_features, **place)
        nn.init.zeros_(self.up.weight)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Apply both; shapes like the linear layer's."""
        result: torch.Tensor = self.base(values) + self.up(self.down(values)) * SCALE
        return result

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Add the product to the linear layer's weights, and return that layer."""
        self.base.weight += SCALE * (self.up.weight @ self.down.weight)
        return self.base


@contextmanager
def trained_parts(model: PreTrainedModel, layers: int | None, rank: int | None) -> Iterator[None]:
    """Restrict which parameters are trained while the block runs; then merge low-rank additions.

    A layer below the trained ones, whose input needs no gradient either, runs without autograd, and without dropout.

    Args:
        model: in training mode.
        layers: number of last layers that are trained; None for the whole model.
        rank: train low-rank additions in place of weights, in these layers or in all; None trains weights. Their
            weights are drawn from torch's global generator.
    """
    trained = layers_of(model)[-layers:] if layers else layers_of(model)
    if layers or rank:
        model.requires_grad_(False)
    if layers:
        model.train(False)
        for layer in trained:
            layer.requires_grad_(rank is None).train()
    places = _linear_layers(trained) if rank else []
    for parent, name, linear in places:
        setattr(parent, name, LowRank(linear, rank or 0))
    try:
        yield
    finally:
        for parent, name, _ in places:
            setattr(parent, name, getattr(parent, name).merged())
        model.requires_grad_(True)


def check_trained(model: PreTrainedModel, layers: int | None, rank: int | None, pooled: tuple[int, ...]) -> None:
    """Check that a model has the layers to be trained, and that the pooled ones are affected.

    Raises:
        InputError: it has fewer, shares weights between layers, is pooled below them, or has no such low rank.
    """
    found = layers_of(model)
    if layers is not None:
        if layers > len(found):
            raise InputError(f"--train-layers is {layers}, and the encoder has {len(found)} layers")
        if len(set(found)) < len(found):
            raise InputError("--train-layers needs layers with weights of their own, and this encoder shares them")
        if max(layer % (len(found) + 1) for layer in pooled) <= len(found) - layers:
            raise InputError(f"--train-layers is {layers}, and the encoder pools layers below those: raise it")
    smallest = min(min(linear.weight.shape) for _, _, linear in _linear_layers(found))
    if rank is not None and rank > smallest // 2:
        raise InputError(f"--lora is {rank}: above {smallest // 2} it would have more numbers than the weights")


def _linear_layers(layers: list[nn.Module]) -> list[tuple[nn.Module, str, nn.Linear]]:
    """List the linear layers with their parents and names, each once."""
    return [
        (parent, name, child)
        for layer in dict.fromkeys(layers)
        for parent in layer.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
