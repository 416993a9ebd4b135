"""The gradient of a loss over a whole batch, in the memory of a part of it (GradCache, Gao et al. 2021, section 3).

A contrastive loss needs the vectors of all texts at once, but the graph behind a vector needs only that vector's
gradient. So all pieces are encoded without a graph; the loss yields each vector's gradient; then each piece is encoded
again, with its graph and the same dropout masks, and its gradient is propagated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch


def accumulate(
    pieces: Sequence[torch.Tensor],
    encode: Callable[[int], torch.Tensor],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> torch.Tensor:
    """Add the gradient of a loss over all pieces' vectors to the parameters' `grad`.

    Args:
        pieces: int64 [texts of the piece] each: their indices in the whole. A single piece is encoded once.
        encode: maps a piece's number to float [texts of the piece, dim].
        loss_of: maps float [texts, dim] to a scalar. Other tensors that it depends on get their gradient, too.
        generator: from which `encode` draws; it is rewound so that both passes draw the same.
        autocast: entered once a pass, so that weights are cast once instead of once a piece.

    Returns:
        The loss, without a graph.
    """
    if len(pieces) == 1:
        with autocast():
            vectors = encode(0)
        leaf = vectors.detach().requires_grad_()
        loss = loss_of(leaf[_inverse(pieces)])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.autograd.backward(vectors, leaf.grad)
        return loss.detach()
    states: list[torch.Tensor] = []
    parts: list[torch.Tensor] = []
    with torch.no_grad(), autocast():
        for piece in range(len(pieces)):
            states.append(generator.get_state())
            parts.append(encode(piece))
    leaf = torch.cat(parts).requires_grad_()
    after = generator.get_state()
    loss = loss_of(leaf[_inverse(pieces)])
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    gradients = leaf.grad.split([len(piece) for piece in pieces])  # type: ignore[no-untyped-call]
    with autocast():
        for piece, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
            generator.set_state(state)
            torch.autograd.backward(encode(piece), gradient)
    generator.set_state(after)
    return loss.detach()


def _inverse(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the index of each text of the whole in the concatenated pieces."""
    return torch.cat(list(pieces)).argsort()
