"""The tuning loop: two views of every text, packed, through the model; one loss; one step."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.host import has_bf16
from training.augment import mask_span
from training.dropout import set_dropout
from training.objective import LOSSES
from training.packed import encode_packed, pack, row_length
from training.recipe import Device, TuneConfig, TunePrecision
from training.reference import Reference


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did.

    Attributes:
        step: 1-based.
        loss: before the step's update.
        tokens: of both views, without padding.
        seconds: since the first step began.
    """

    step: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a run runs on, after `auto` was decided."""

    device: Device
    precision: TunePrecision


def choose_hardware(device: Device, precision: TunePrecision) -> Hardware:
    """Decide what `auto` means on this machine.

    Raises:
        EngineError: CUDA was asked for and is not there.
    """
    if device is Device.AUTO:
        device = Device.CUDA if torch.cuda.is_available() else Device.CPU
    if device is Device.CUDA and not torch.cuda.is_available():
        raise EngineError("--device cuda: this PyTorch sees no NVIDIA GPU. Install a CUDA build, or say --device cpu")
    if precision is TunePrecision.AUTO:
        precision = TunePrecision.BF16 if _multiplies_bf16(device) else TunePrecision.FP32
    return Hardware(device=device, precision=precision)


def steps_in(texts: int, config: TuneConfig) -> int:
    """Count the steps of a run: the last texts of an epoch, fewer than a batch, are left out."""
    return config.epochs * (texts // config.batch_size)


def train(
    reference: Reference,
    texts: Sequence[str],
    config: TuneConfig,
    hardware: Hardware,
    on_step: Callable[[Step], None],
) -> None:
    """Tune the reference's model in place. One seed gives the same weights again on one machine's CPU.

    Seeds torch's global generator, from which dropout draws.

    Args:
        reference: model, tokenizer and pooling; left in evaluation mode on the CPU.
        texts: distinct.
        config: the recipe.
        hardware: where and how.
        on_step: called after each step.

    Raises:
        InputError: fewer texts than a batch, no mask token, or a loss that is not finite.
    """
    model: Any = reference.model  # the types of its `to` and `eval` are lost behind transformers' decorators
    tokenizer = reference.tokenizer
    if len(texts) < config.batch_size:
        raise InputError(
            f"the corpus has {len(texts)} distinct lines, fewer than one batch of {config.batch_size}: "
            "give more text or a smaller --batch-size"
        )
    if config.mask_length and tokenizer.mask_token is None:
        raise InputError("the tokenizer has no mask token: say --mask-length 0")
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    model.to(hardware.device.value)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    begin = time.perf_counter()
    with set_dropout(model, config.dropout):
        for step, batch in enumerate(_batches(texts, config, rng), start=1):
            loss, tokens = _loss(reference, batch, config, hardware, rng)
            if not math.isfinite(loss.item()):
                raise InputError(
                    f"the loss is {loss.item()} at step {step}: nothing was written. Lower --lr (it is {config.lr})"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            on_step(Step(step=step, loss=loss.item(), tokens=tokens, seconds=time.perf_counter() - begin))
    model.to("cpu")
    model.eval()
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise InputError(f"weights are not finite at the end: nothing was written. Lower --lr (it is {config.lr})")


def _batches(texts: Sequence[str], config: TuneConfig, rng: random.Random) -> Iterator[list[str]]:
    for _ in range(config.epochs):
        order = rng.sample(texts, len(texts))
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            yield order[start : start + config.batch_size]


def _loss(
    reference: Reference, batch: list[str], config: TuneConfig, hardware: Hardware, rng: random.Random
) -> tuple[torch.Tensor, int]:
    tokenizer, spec = reference.tokenizer, reference.spec
    masked = [mask_span(text, str(tokenizer.mask_token), config.mask_length, rng) for text in batch]
    first, second = (_tokenize(tokenizer, view, config.max_tokens) for view in (batch, masked))
    packed = pack(
        [*first, *second],
        length=row_length(spec.pad_to or config.max_tokens),
        pad_id=tokenizer.pad_token_id,
        pad_to=spec.pad_to,
    )
    with _autocast(hardware):
        vectors = encode_packed(reference.model, packed, spec.pooling)
    groups, count = _groups(first).to(vectors.device), len(batch)
    loss = LOSSES[config.objective](vectors[:count], vectors[count:], config.temperature, groups)
    return loss, packed.tokens


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return ids


def _groups(texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Number texts so that equal token ids get equal numbers: int64 [texts].

    Distinct lines may still be one to the model: by case, by white space, or beyond the limit.
    """
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(ids), len(numbers)) for ids in texts])


def _autocast(hardware: Hardware) -> contextlib.AbstractContextManager[object]:
    if hardware.precision is TunePrecision.FP32:
        return contextlib.nullcontext()
    return torch.autocast(hardware.device.value, dtype=torch.bfloat16)


def _multiplies_bf16(device: Device) -> bool:
    if device is Device.CUDA:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return has_bf16()
