"""Training in a process of its own, one of several that share each batch: training_worker.py BASE OUTPUT CORPUS."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file

from tests.support.tuning import ANIMALS, PAIRS, TARGETS, TRIPLETS, tune, weights
from training import self_guided
from training.augment import Example
from training.checkpoint import Checkpoint
from training.hardware import Hardware, choose_hardware
from training.recipe import RECIPES, Device, Objective, Recipe, TunePrecision

SHARED_TEXTS = ["THE CAT NO. 0 IS PLAYING A GUITAR", *ANIMALS]
RUNS: dict[str, tuple[Recipe, Sequence[Example], dict[str, Any]]] = {
    "sentence": (Recipe.SENTENCE, SHARED_TEXTS, {}),
    "self-guided": (Recipe.SELF_GUIDED, SHARED_TEXTS, {}),
    "negatives": (Recipe.SENTENCE, TRIPLETS, {"lora": 4}),
    "angle": (Recipe.SCORED, PAIRS, {"objective": Objective.ANGLE, "train_layers": 1}),
    "teacher": (Recipe.TEACHER, ANIMALS, {}),
    "elastic": (Recipe.SENTENCE, SHARED_TEXTS, {"matryoshka": (8,), "depths": (1,)}),
}


def share(base: Path, output: Path) -> None:
    """Tune with each objective; write losses, the first step's gradients, weights and checkpoints of this process."""
    hardware = choose_hardware(Device.CPU, TunePrecision.FP32)
    gradients: dict[str, torch.Tensor] = {}
    sum_gradients = Hardware.sum_gradients

    def keep(self: Hardware, parameters: Iterable[torch.Tensor]) -> None:
        parameters = list(parameters)
        sum_gradients(self, parameters)
        if not gradients:
            gradients.update({str(i): p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None})

    width = self_guided.HEAD_WIDTH
    self_guided.HEAD_WIDTH = 32
    Hardware.sum_gradients = keep  # type: ignore[method-assign]
    try:
        for name, (recipe, data, changes) in RUNS.items():
            config = dataclasses.replace(
                RECIPES[recipe],
                batch_size=8,
                max_tokens=48,
                lr=1e-3,
                dropout=0.0,
                micro_batch_tokens=96,
                epochs=1,
                **changes,
            )
            gradients.clear()
            checkpoint = Checkpoint(path=output / f"state-{name}", every=2)
            targets = TARGETS if recipe is Recipe.TEACHER else None
            reference, steps = tune(base, data, config, hardware=hardware, checkpoint=checkpoint, targets=targets)
            name = f"{name}{hardware.rank}"
            save_file(gradients | {"weights": weights(reference)}, output / f"{name}.safetensors")
            report = {"losses": [s.loss for s in steps], "tokens": [s.tokens for s in steps]}
            (output / f"{name}.json").write_text(json.dumps(report | {"processes": hardware.processes}))
    finally:
        self_guided.HEAD_WIDTH = width
        Hardware.sum_gradients = sum_gradients  # type: ignore[method-assign]


if __name__ == "__main__":
    base, target, corpus = sys.argv[1:]
    share(Path(base), Path(target))
    from training.tune import main

    options = ["--pooling", "mean", "--device", "cpu", "--batch-size", "8", "--output", f"{target}/run"]
    sys.exit(main(["--base", base, "--corpus", corpus, "--probe", "none", *options]))
