"""Objectives: losses over the vectors of a whole batch, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from training.recipe import Objective, Variant


def nt_xent(
    first: torch.Tensor,
    second: torch.Tensor,
    temperature: float,
    groups: torch.Tensor,
    negatives: torch.Tensor | None = None,
    negative_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the mean cross-entropy of identifying each vector's other view among all 2B - 1 other vectors.

    The positive is part of the denominator and both views of the other texts are negatives, as in the published code
    (the paper prints the sum without the positive). Hard negatives are candidates for every vector, as in supervised
    SimCSE (equation 5).

    Args:
        first: float [B, dim]; need not be normalised, since similarity is the cosine.
        second: float [B, dim], the same texts' second views.
        temperature: divides the cosine.
        groups: int64 [B]: texts of one group are the same to the model, so they are not negatives of each other.
        negatives: float [M, dim], hard negatives of any texts.
        negative_groups: int64 [M], the group that a hard negative's text belongs to; -1 for none.
    """
    count = first.shape[0]
    vectors = torch.nn.functional.normalize(torch.cat([first, second]).float(), dim=1)
    index = torch.arange(2 * count, device=first.device)
    partner = (index + count) % (2 * count)
    both = groups.repeat(2)
    excluded = both[:, None] == both[None, :]
    excluded[index, partner] = False
    similarity = (vectors @ vectors.T / temperature).masked_fill(excluded, float("-inf"))
    if negatives is not None and negative_groups is not None:
        hard = _cosines(vectors, negatives, temperature)
        hard = hard.masked_fill(both[:, None] == negative_groups[None, :], float("-inf"))
        similarity = torch.cat([similarity, hard], dim=1)
    return torch.nn.functional.cross_entropy(similarity, partner)


def cosent(similarities: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute log(1 + sum of exp((s_j - s_i) / temperature)) over all pairs i with a higher score than pair j.

    Args:
        similarities: float32 [B], of the two vectors of each pair.
        scores: float32 [B].
        temperature: divides the differences.
    """
    differences = (similarities[None, :] - similarities[:, None]) / temperature
    wrong = differences.masked_fill(scores[:, None] <= scores[None, :], float("-inf"))
    return torch.cat([wrong.new_zeros(1), wrong.flatten()]).logsumexp(dim=0)


def scored_loss(
    objective: Objective, first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Compute CoSENT, or AnglE, of the vectors of scored pairs, float [B, dim] each, and their scores [B]."""
    first, second = (torch.nn.functional.normalize(side.float(), dim=1) for side in (first, second))
    loss = cosent((first * second).sum(dim=1), scores, temperature)
    if objective is Objective.ANGLE:
        # The halves of a vector are real and imaginary part: equation 5, for unit vectors, as in the published code.
        (a, b), (c, d) = first.chunk(2, dim=1), second.chunk(2, dim=1)
        loss = loss + cosent((a * c + b * d + b * c - a * d).sum(dim=1).abs(), scores, temperature)
    return loss


def match_scores(first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute the mean of KL(scores' || vectors') over the first texts, each a softmax over the second texts.

    Args:
        first: float [B, dim].
        second: float [B, dim].
        scores: float32 [B, B], of first and second texts, on the scale of cosines.
        temperature: divides cosines and scores.
    """
    student = _cosines(first, second, temperature).log_softmax(dim=1)
    teacher = (scores / temperature).log_softmax(dim=1)
    return torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


def match_teacher(
    vectors: torch.Tensor, targets: torch.Tensor, temperature: float, groups: torch.Tensor
) -> torch.Tensor:
    """Compute the mean of 1 - cosine of each vector and its target, plus the divergence of their neighbourhoods.

    A text's neighbourhood is the softmax over the other texts of its cosines with them over the temperature; the
    divergence is the mean of KL(targets' || vectors'). Vectors of another width than the targets have no cosine with
    them: then only the neighbourhoods count.

    Args:
        vectors: float [B, dim], of the student.
        targets: float [B, dim], the same texts' vectors by the teacher.
        temperature: divides the cosines.
        groups: int64 [B]: see `nt_xent`.
    """
    distance = vectors.new_zeros(())
    if vectors.shape[1] == targets.shape[1]:
        distance = 1 - torch.nn.functional.cosine_similarity(vectors.float(), targets, dim=1).mean()
    same = _same(groups)
    lowest = torch.finfo(torch.float32).min  # not -inf: a batch may be one text many times, and 0 x inf is NaN
    student, teacher = (
        _cosines(side, side, temperature).masked_fill(same, lowest).log_softmax(dim=1) for side in (vectors, targets)
    )
    return distance + torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


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
