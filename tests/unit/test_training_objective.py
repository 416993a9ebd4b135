"""The loss, against its definition written out."""

import math

import pytest
import torch

from training.objective import nt_xent


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
    assert loss.item() == pytest.approx(written_out(first, second, 0.2, groups), abs=1e-5)


def test_the_length_of_vectors_does_not_matter_and_bf16_is_lifted_to_fp32() -> None:
    first, second = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2)).bfloat16().unbind()
    loss = nt_xent(first, second, 0.04, torch.arange(6))
    assert loss.dtype is torch.float32
    assert nt_xent(first.float() * 1000, second.float(), 0.04, torch.arange(6)).item() == pytest.approx(
        loss.item(), rel=1e-5
    )


def test_texts_that_are_equal_do_not_push_each_other_away() -> None:
    vector = torch.tensor([[1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    nt_xent(vector, vector.detach().clone(), 0.04, torch.tensor([0, 0])).backward()
    assert vector.grad is not None
    assert vector.grad.abs().max() < 1e-6
    assert nt_xent(vector, vector, 0.04, torch.tensor([0, 1])).item() == pytest.approx(math.log(3), abs=1e-5)
