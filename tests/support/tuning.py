"""Loading and tuning of tiny encoders, for tests of training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from encoders.reference import Reference
from encoders.source import resolve
from mirror_runtime.bundle import Pooling
from training.augment import Example, Scored
from training.checkpoint import Checkpoint, Step
from training.hardware import Hardware
from training.hybrid import HybridScores
from training.recipe import RECIPES, Device, Recipe, TuneConfig, TunePrecision
from training.teacher import add_dense
from training.trainer import train

FP32 = Hardware(device=Device.CPU, precision=TunePrecision.FP32)
SCORED = RECIPES[Recipe.SCORED]
TEACHER = RECIPES[Recipe.TEACHER]
ANIMALS = [f"the {animal} no. {i} is playing a guitar" for i in range(8) for animal in ("cat", "dog", "man", "river")]
PAIRS = [Scored(text, other, float(i % 5)) for i, (text, other) in enumerate(zip(ANIMALS, ANIMALS[3:], strict=False))]
TRIPLETS = [
    (text, f"{text} at noon", *[f"a mat no. {i}"] * (i % 3 > 0), *["a cat"] * (i % 3 > 1))
    for i, text in enumerate(ANIMALS)
]
"""With none, one or two hard negatives."""
TARGETS = torch.nn.functional.normalize(torch.randn(len(ANIMALS), 48, generator=torch.Generator().manual_seed(1)))
"""A teacher's vectors of `ANIMALS`, wider than the tiny encoders'."""


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
    targets: torch.Tensor | HybridScores | None = None,
) -> tuple[Reference, list[Step]]:
    """Tune an encoder, with a dense layer if `targets` are of another width; return it and its steps."""
    reference = load(folder, pooling, max_tokens=config.max_tokens if pooling is Pooling.MEAN_PADDED else None)
    if isinstance(targets, torch.Tensor) and targets.shape[1] != reference.spec.dim:
        reference = add_dense(reference, targets.shape[1], config.seed)
    steps: list[Step] = []

    def record(step: Step) -> None:
        on_step(step)
        steps.append(step)

    train(reference, texts, config, hardware, record, checkpoint, targets)
    return reference, steps


def weights(reference: Reference) -> torch.Tensor:
    """Return all weights in one dimension."""
    modules = (reference.model, *reference.dense)
    return torch.cat([value.flatten() for module in modules for value in module.state_dict().values()])
