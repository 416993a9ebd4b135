"""The self-guided objective: a text's vector learns from the layers of a frozen copy of its own model (SG-BERT)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mirror_runtime.bundle import Pooling
from training.objective import GUIDED_LOSSES
from training.packed import PackedTexts, hidden_states, pool_packed
from training.recipe import Variant

HEAD_WIDTH = 4096
"""Width of both layers of the projection head (SG-BERT section 4.1)."""


class SelfGuided:
    """The frozen copy, the projection head and the drift penalty, which are discarded after tuning.

    Freezes the embeddings of `model`, as the paper does. Draws the head's weights from torch's global generator.
    """

    def __init__(self, model: Any, variant: Variant, temperature: float, drift: float) -> None:
        self.frozen: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.model = model
        self.variant = variant
        self.temperature = temperature
        self.drift = drift
        layers = nn.Linear(model.config.hidden_size, HEAD_WIDTH), nn.Linear(HEAD_WIDTH, HEAD_WIDTH)
        for layer in layers:
            nn.init.normal_(layer.weight, std=model.config.initializer_range)
            nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU())
        self.head.to(model.device)
        model.embeddings.requires_grad_(False)

    def views(self, packed: PackedTexts, layers: torch.Tensor) -> torch.Tensor:
        """Max-pool layers of the frozen copy; layer 0 is the embeddings.

        `layers` is int64 [texts], the layer drawn for each text; OPT3 uses all layers instead.

        Returns:
            float32 [texts, views, dim], on the model's device.
        """
        with torch.no_grad():
            states = hidden_states(self.frozen, packed)
            pooled = torch.stack([pool_packed(state, packed, Pooling.MAX) for state in states], dim=1)
        if self.variant is Variant.OPT3:
            return pooled
        return pooled[torch.arange(len(layers), device=pooled.device), layers.to(pooled.device)][:, None]

    def loss(self, vectors: torch.Tensor, views: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Compute the contrastive part of the loss: see `GuidedLoss`; the vectors are projected here."""
        projected = self.head(torch.cat([vectors[:, None], views], dim=1))
        return GUIDED_LOSSES[self.variant](projected[:, 0], projected[:, 1:], self.temperature, groups)

    def add_drift(self) -> float:
        """Add the drift penalty's gradient to the parameters' `grad`; return the weighted penalty."""
        pairs = zip(self.model.parameters(), self.frozen.parameters(), strict=True)
        moved = [(tuned, frozen) for tuned, frozen in pairs if tuned.grad is not None]
        differences = torch._foreach_sub([tuned.detach() for tuned, _ in moved], [frozen for _, frozen in moved])
        torch._foreach_add_([tuned.grad for tuned, _ in moved], differences, alpha=2 * self.drift)
        return self.drift * sum(float(norm) ** 2 for norm in torch._foreach_norm(differences))
