"""Objectives: losses over the vectors of a whole batch, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from training.recipe import Variant


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float, groups: torch.Tensor) -> torch.Tensor:
    """Compute the mean cross-entropy of identifying each vector's other view among all 2B - 1 other vectors.

    The positive is part of the denominator and both views of the other texts are negatives, as in the published code
    (the paper prints the sum without the positive).

    Args:
        first: float [B, dim]; need not be normalised, since similarity is the cosine.
        second: float [B, dim], the same texts' second views.
        temperature: divides the cosine.
        groups: int64 [B]: texts of one group are the same to the model, so they are not negatives of each other.
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


def guided_opt1(vectors: torch.Tensor, views: torch.Tensor, temperature: float, groups: torch.Tensor) -> torch.Tensor:
    """Compute SG-BERT's OPT1; arguments like `guided_opt3`, with K = 1."""
    negatives = _cosines(vectors, vectors, temperature).masked_fill(_same(groups), float("-inf"))
    return torch.nn.functional.cross_entropy(
        torch.cat([_view_logits(vectors, views[:, 0], temperature, groups), negatives], dim=1),
        torch.arange(len(groups), device=groups.device),
    )


def guided_opt2(vectors: torch.Tensor, views: torch.Tensor, temperature: float, groups: torch.Tensor) -> torch.Tensor:
    """Compute SG-BERT's OPT2; arguments like `guided_opt3`, with K = 1."""
    return torch.nn.functional.cross_entropy(
        _view_logits(vectors, views[:, 0], temperature, groups), torch.arange(len(groups), device=groups.device)
    )


def guided_opt3(vectors: torch.Tensor, views: torch.Tensor, temperature: float, groups: torch.Tensor) -> torch.Tensor:
    """Compute SG-BERT's OPT3: the mean over texts i and layers k of -log p(i, k); arguments like `nt_xent`.

    p(i, k) is the share of view (i, k) among itself and all layers' views of all other texts. `vectors` [B, dim] are of
    the tuned model, after the projection head; `views` [B, K, dim] of the frozen copy, after the same head.
    """
    count, layers, dim = views.shape
    cosines = _cosines(vectors, views.reshape(count * layers, dim), temperature).view(count, count, layers)
    index = torch.arange(count, device=groups.device)
    positives = cosines[index, index]
    negatives = cosines.masked_fill(_same(groups)[:, :, None], float("-inf")).flatten(1).logsumexp(dim=1)
    return (torch.logaddexp(positives, negatives[:, None]) - positives).mean()


def _cosines(left: torch.Tensor, right: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return all cosines over the temperature, float32 [left, right]."""
    normalize = torch.nn.functional.normalize
    return normalize(left.float(), dim=-1) @ normalize(right.float(), dim=-1).T / temperature


def _same(groups: torch.Tensor) -> torch.Tensor:
    return groups[:, None] == groups[None, :]


def _view_logits(vectors: torch.Tensor, views: torch.Tensor, temperature: float, groups: torch.Tensor) -> torch.Tensor:
    """Return float32 [B, B]: vector against view, the positive on the diagonal, -inf elsewhere for the same text."""
    others = _same(groups) & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    return _cosines(vectors, views, temperature).masked_fill(others, float("-inf"))


GuidedLoss = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor], torch.Tensor]
"""(vectors [B, dim], views [B, K, dim], temperature, groups [B]) -> scalar."""

GUIDED_LOSSES: Mapping[Variant, GuidedLoss] = {
    Variant.BASE: lambda vectors, views, temperature, groups: nt_xent(vectors, views[:, 0], temperature, groups),
    Variant.OPT1: guided_opt1,
    Variant.OPT2: guided_opt2,
    Variant.OPT3: guided_opt3,
}
