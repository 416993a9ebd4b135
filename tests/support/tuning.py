"""Loading and tuning of tiny encoders, for tests of training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from encoders.reference import Reference
from encoders.source import resolve
from mirror_runtime.bundle import Pooling
from training.augment import Example
from training.checkpoint import Checkpoint, Step
from training.hardware import Hardware
from training.recipe import Device, TuneConfig, TunePrecision
from training.trainer import train

FP32 = Hardware(device=Device.CPU, precision=TunePrecision.FP32)
ANIMALS = [f"the {animal} no. {i} is playing a guitar" for i in range(8) for animal in ("cat", "dog", "man", "river")]


def load(folder: Path, pooling: Pooling = Pooling.MEAN, **options: Any) -> Reference:
    """Load a plain Hugging Face folder."""
    return Reference.load(resolve(str(folder), pooling=pooling, **options))


def tune(
    folder: Path,
    texts: Sequence[Example],
    config: TuneConfig,
    *,
    hardware: Hardware = FP32,
    pooling: Pooling = Pooling.MEAN,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> tuple[Reference, list[Step]]:
    """Tune an encoder; return it and its steps."""
    reference = load(folder, pooling, max_tokens=config.max_tokens if pooling is Pooling.MEAN_PADDED else None)
    steps: list[Step] = []

    def record(step: Step) -> None:
        on_step(step)
        steps.append(step)

    train(reference, texts, config, hardware, record, checkpoint)
    return reference, steps


def weights(reference: Reference) -> torch.Tensor:
    """Return all weights in one dimension."""
    return torch.cat([value.flatten() for value in reference.model.state_dict().values()])
