"""What a step minimises. An objective takes the two views' vectors and gives a loss; they are found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

import torch


class Objective(str, Enum):
    """Names of objectives."""

    MIRROR = "mirror"
    """Symmetric NT-Xent over both views (Mirror-BERT equation 1, in the form of its published code)."""


Loss = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor], torch.Tensor]
"""(first view [B, dim], second view [B, dim], temperature, groups [B]) -> scalar."""


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float, groups: torch.Tensor) -> torch.Tensor:
    """Give the mean cross-entropy of finding each vector's other view among all 2B - 1 other vectors.

    The positive is part of the denominator and both views of the other texts are negatives, as in the published code
    (the paper prints the sum without the positive).

    Args:
        first: float [B, dim], need not be normalised: similarity is the cosine.
        second: float [B, dim], the same texts' second views.
        temperature: divides the cosine.
        groups: int64 [B]: texts of one group are the same to the model, and so are no negatives of each other.

    Returns:
        float32 scalar.
    """
    count = first.shape[0]
    vectors = torch.nn.functional.normalize(torch.cat([first, second]).float(), dim=1)
    index = torch.arange(2 * count, device=first.device)
    partner = (index + count) % (2 * count)
    both = groups.repeat(2)
    excluded = both[:, None] == both[None, :]
    excluded[index, partner] = False
    similarity = (vectors @ vectors.T / temperature).masked_fill(excluded, float("-inf"))
    return torch.nn.functional.cross_entropy(similarity, partner)


LOSSES: Mapping[Objective, Loss] = {Objective.MIRROR: nt_xent}
