"""Training in a process of its own, one of several that share each batch: training_worker.py BASE OUTPUT CORPUS."""

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file

from tests.support.tuning import ANIMALS, tune, weights
from training import self_guided
from training.checkpoint import Checkpoint
from training.hardware import Hardware, choose_hardware
from training.recipe import RECIPES, Device, Recipe, TunePrecision

SHARED_TEXTS = ["THE CAT NO. 0 IS PLAYING A GUITAR", *ANIMALS]


def share(base: Path, output: Path) -> None:
    """Tune with two objectives; write losses, the first step's gradients, weights and checkpoints of this process."""
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
        for recipe in (Recipe.SENTENCE, Recipe.SELF_GUIDED):
            config = dataclasses.replace(
                RECIPES[recipe], batch_size=8, max_tokens=48, lr=1e-3, dropout=0.0, micro_batch_tokens=96, epochs=1
            )
            gradients.clear()
            checkpoint = Checkpoint(path=output / f"state-{recipe.value}", every=2)
            reference, steps = tune(base, SHARED_TEXTS, config, hardware=hardware, checkpoint=checkpoint)
            name = f"{recipe.value}{hardware.rank}"
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
