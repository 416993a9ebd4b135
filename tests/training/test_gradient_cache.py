"""The gradient cache computes the gradients of the whole batch in the memory of a piece."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mirror_runtime.bundle import Pooling
from tests.support.tuning import FP32, load, tune
from training.checkpoint import Step
from training.dropout import set_dropout
from training.gradient_cache import accumulate
from training.objective import nt_xent
from training.packed import encode_packed, pack
from training.recipe import TuneConfig, TunePrecision

pytestmark = pytest.mark.tunes

WORDS = ("the", "cat", "sat", "on", "a", "mat", "man", "playing", "guitar", "river")
TEXTS = [" ".join(WORDS[(i * j) % 10] for j in range(1, 3 + i % 9)) + f" {i}" for i in range(60)]


def gradients(folder: Path, rows: int, cached: bool) -> tuple[float, torch.Tensor]:
    """Return the gradient of one batch with dropout, and its loss plus the next random number."""
    reference = load(folder)
    model = reference.model
    packed = pack(reference.tokenizer([*TEXTS, *TEXTS])["input_ids"], length=64, pad_id=0)
    places, pieces = zip(*packed.split(rows), strict=True)
    assert len(pieces) > 1

    def encode(piece: int) -> torch.Tensor:
        return encode_packed(model, pieces[piece], Pooling.MEAN)

    def loss_of(vectors: torch.Tensor) -> torch.Tensor:
        return nt_xent(vectors[:60], vectors[60:], 0.04, torch.arange(60))

    model.train()
    torch.manual_seed(5)
    with set_dropout(model, 0.3):
        if cached:
            loss = accumulate(places, encode, loss_of, torch.default_generator)
        else:
            parts = [encode(piece) for piece in range(len(pieces))]
            loss = loss_of(torch.cat(parts)[torch.cat(places).argsort()])
            loss.backward()
    after = torch.rand(1)
    grads = [value.grad.flatten() for value in model.parameters() if value.grad is not None]
    return loss.item() + after.item(), torch.cat(grads)


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_with_dropout_equal_those_of_the_plain_loss(tiny_bert: Path, rows: int) -> None:
    plain, expected = gradients(tiny_bert, rows, cached=False)
    loss, gradient = gradients(tiny_bert, rows, cached=True)
    assert loss == pytest.approx(plain, rel=1e-6)  # and the generator has advanced equally
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5


def most_saved_bytes(folder: Path, pairs: int, micro_batch_tokens: int | None) -> int:
    """Return the maximum bytes that the model's graph holds between two backward passes."""
    texts = [f"{TEXTS[i % 60]} {i}" for i in range(pairs)]
    config = TuneConfig(batch_size=pairs, max_tokens=48, micro_batch_tokens=micro_batch_tokens)
    held, most = 0, 0

    def pack_hook(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        nonlocal held, most
        size = tensor.numel() * tensor.element_size()
        size *= tensor.shape[-1:] != (pairs * 2,)  # the loss's own matrix is not the model's
        held += size
        most = max(most, held)
        return tensor, size

    def unpack_hook(saved: tuple[torch.Tensor, int]) -> torch.Tensor:
        nonlocal held
        held -= saved[1]
        return saved[0]

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, unpack_hook):
        tune(folder, texts, config)
    return most


def test_memory_does_not_grow_with_the_batch(tiny_bert: Path) -> None:
    few, many = (most_saved_bytes(tiny_bert, pairs, 256) for pairs in (30, 300))
    assert many < 1.5 * few
    assert most_saved_bytes(tiny_bert, 300, None) > 5 * many


def test_a_run_in_pieces_has_the_losses_and_tokens_of_one_piece(tiny_bert: Path) -> None:
    def steps(micro_batch_tokens: int | None) -> list[Step]:
        config = TuneConfig(batch_size=20, max_tokens=48, dropout=0.0, micro_batch_tokens=micro_batch_tokens)
        return tune(tiny_bert, TEXTS, config)[1]

    in_pieces, at_once = steps(128), steps(None)
    assert [step.tokens for step in in_pieces] == [step.tokens for step in at_once]
    assert [step.loss for step in in_pieces] == pytest.approx([step.loss for step in at_once], rel=1e-4)


class CastCounter(TorchDispatchMode):
    """Counts casts of the feed-forward weights to bf16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += tuple(args[0].shape) == (64, 32)
        return func(*args, **(kwargs or {}))


def test_bf16_weights_are_cast_once_a_pass(tiny_bert: Path) -> None:
    hardware = dataclasses.replace(FP32, precision=TunePrecision.BF16)
    with CastCounter() as casts:
        tune(tiny_bert, TEXTS, TuneConfig(batch_size=60, max_tokens=48, micro_batch_tokens=128), hardware=hardware)
    layers, passes = 2, 2
    assert casts.count == layers * passes
