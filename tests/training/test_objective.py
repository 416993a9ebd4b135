"""The loss, against its definition written out."""

import math

import pytest
import torch

from training.objective import GUIDED_LOSSES, match_teacher, nt_xent, scored_loss
from training.recipe import Objective, Variant


def written_out(first: torch.Tensor, second: torch.Tensor, temperature: float, groups: list[int]) -> float:
    vectors = [*first, *second]
    count, labels = len(first), [*groups, *groups]

    def likeness(a: int, b: int) -> float:
        cosine = float(vectors[a] @ vectors[b] / vectors[a].norm() / vectors[b].norm())
        return math.exp(cosine / temperature)

    total = 0.0
    for anchor in range(2 * count):
        partner = (anchor + count) % (2 * count)
        negatives = [other for other in range(2 * count) if labels[other] != labels[anchor]]
        positive = likeness(anchor, partner)
        total -= math.log(positive / (positive + sum(likeness(anchor, other) for other in negatives)))
    return total / (2 * count)


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 1, 0, 3, 0], [0, 0, 0, 0, 0]])
def test_it_equals_its_definition(groups: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 5, 8, generator=generator).unbind()
    loss = nt_xent(first, second, 0.2, torch.tensor(groups))
    base = GUIDED_LOSSES[Variant.BASE](first, second[:, None], 0.2, torch.tensor(groups))
    assert loss.item() == pytest.approx(written_out(first, second, 0.2, groups), abs=1e-5)
    assert base.item() == pytest.approx(loss.item(), abs=1e-5), "SG-BERT's base form between vector and view"


def test_the_length_of_vectors_does_not_matter_and_bf16_is_lifted_to_fp32() -> None:
    first, second = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2)).bfloat16().unbind()
    loss = nt_xent(first, second, 0.04, torch.arange(6))
    assert loss.dtype is torch.float32
    longer = nt_xent(first.float() * 1000, second.float(), 0.04, torch.arange(6))
    assert longer.item() == pytest.approx(loss.item(), rel=1e-5)


def test_hard_negatives_are_candidates_of_every_vector_except_of_their_own_group() -> None:
    generator = torch.Generator().manual_seed(6)
    first, second, hard = torch.randn(3, 3, 8, generator=generator).unbind()
    loss = nt_xent(first, second, 0.2, torch.tensor([0, 1, 2]), hard, torch.tensor([-1, 1, -1]))
    vectors, total = [*first, *second], 0.0
    for anchor in range(6):
        others = [vectors[other] for other in range(6) if other % 3 != anchor % 3]
        others += [hard[i] for i in (0, 1, 2) if not (i == 1 and anchor % 3 == 1)]
        positive = phi(vectors[anchor], vectors[(anchor + 3) % 6])
        total -= math.log(positive / (positive + sum(phi(vectors[anchor], other) for other in others)))
    assert loss.item() == pytest.approx(total / 6, abs=1e-5)


@pytest.mark.parametrize("objective", [Objective.COSENT, Objective.ANGLE])
def test_scored_losses_equal_their_definitions(objective: Objective) -> None:
    from sentence_transformers.util import pairwise_angle_sim, pairwise_cos_sim

    first, second = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(7)).unbind()
    scores = [0.0, 1.0, 1.0, 2.5, -1.0, 2.5]
    expected = 0.0
    for like in [pairwise_cos_sim, pairwise_angle_sim][: 1 + (objective is Objective.ANGLE)]:
        found = like(first, second).tolist()
        wrong = [(i, j) for i in range(6) for j in range(6) if scores[i] > scores[j]]
        expected += math.log(1 + sum(math.exp((found[j] - found[i]) / 0.05) for i, j in wrong))
    loss = scored_loss(objective, first, 3 * second, torch.tensor(scores), 0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_teacher_is_matched_when_vectors_and_neighbourhoods_are_its_own() -> None:
    vectors, targets = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(8)).unbind()
    groups, divergence = torch.arange(4), 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        p, q = ([phi(side[i], side[j]) for j in others] for side in (targets, vectors))
        divergence += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True)) / 4
    distance = 1 - torch.nn.functional.cosine_similarity(vectors, targets).mean().item()
    assert match_teacher(vectors, targets, 0.2, groups).item() == pytest.approx(distance + divergence, rel=1e-4)
    assert match_teacher(5 * targets, targets, 0.2, groups).item() == pytest.approx(0, abs=1e-5)
    same = match_teacher(vectors, targets, 0.2, torch.zeros(4, dtype=torch.int64))
    assert same.item() == pytest.approx(distance, rel=1e-4), "texts that are the same have no neighbourhood"


GROUPS = [0, 1, 2, 1, 4]


def phi(left: torch.Tensor, right: torch.Tensor) -> float:
    return math.exp(float(left @ right / left.norm() / right.norm()) / 0.2)


def guided_written_out(variant: Variant, c: torch.Tensor, h: torch.Tensor) -> float:
    """SG-BERT's equations, with texts of one group left out of each other's negatives."""
    terms = []
    for i in range(len(c)):
        others = [j for j in range(len(c)) if GROUPS[j] != GROUPS[i]]
        for k in range(h.shape[1]):
            positive = phi(c[i], h[i, k])
            views = sum(phi(c[i], h[m, n]) for m in others for n in range(h.shape[1]))
            vectors = sum(phi(c[i], c[j]) for j in others) if variant is Variant.OPT1 else 0
            terms.append(-math.log(positive / (positive + views + vectors)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("variant", "layers"), [(Variant.OPT1, 1), (Variant.OPT2, 1), (Variant.OPT3, 1), (Variant.OPT3, 4)]
)
def test_self_guided_losses_equal_their_definitions(variant: Variant, layers: int) -> None:
    generator = torch.Generator().manual_seed(3)
    vectors, views = torch.randn(5, 8, generator=generator), torch.randn(5, layers, 8, generator=generator)
    loss = GUIDED_LOSSES[variant](vectors, views, 0.2, torch.tensor(GROUPS))
    assert loss.item() == pytest.approx(guided_written_out(variant, vectors, views), abs=1e-5)


@pytest.mark.parametrize("variant", list(Variant))
def test_a_batch_of_one_text_alone_teaches_nothing_and_breaks_nothing(variant: Variant) -> None:
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    views = torch.randn(3, 1 if variant is not Variant.OPT3 else 2, 8, generator=torch.Generator().manual_seed(5))
    GUIDED_LOSSES[variant](vectors, views, 0.2, torch.tensor([0, 0, 0])).backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().max() < 1e-6
