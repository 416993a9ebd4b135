"""Several processes that share a batch do what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import ROOT

WORKER = """
import dataclasses, json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from safetensors.torch import save_file
from mirror_runtime.bundle import Pooling
from training import self_guided, trainer
from training.hardware import choose_hardware
from training.checkpoint import Checkpoint
from training.recipe import RECIPES, Device, Recipe, TuneConfig, TunePrecision
from encoders.reference import Reference
from encoders.source import resolve

self_guided.HEAD_WIDTH = 32
hardware = choose_hardware(Device.CPU, TunePrecision.FP32)
base, output = sys.argv[1:]
texts = [f"the {{animal}} no. {{i}} is playing" for i in range(8) for animal in ("cat", "dog", "man", "river")]
texts = ["THE CAT NO. 0 IS PLAYING", *texts]
gradients = {{}}
summed = trainer.Hardware.sum_gradients

def keep(self, parameters):
    summed(self, parameters)
    if not gradients:
        gradients.update({{str(i): value.grad.clone() for i, value in enumerate(parameters) if value.grad is not None}})

trainer.Hardware.sum_gradients = keep
for recipe in (Recipe.SENTENCE, Recipe.SELF_GUIDED):
    config = dataclasses.replace(
        RECIPES[recipe], batch_size=8, max_tokens=48, lr=1e-3, dropout=0.0, micro_batch_tokens=96, epochs=1
    )
    gradients.clear()
    steps = []
    reference = Reference.load(resolve(base, pooling=Pooling.MEAN))
    checkpoint = Checkpoint(path=Path(output) / f"state-{{recipe.value}}", every=2)
    trainer.train(reference, texts, config, hardware, steps.append, checkpoint)
    name = f"{{recipe.value}}{{hardware.rank}}"
    save_file(gradients, Path(output) / f"gradients-{{name}}.safetensors")
    save_file(dict(reference.model.state_dict()), Path(output) / f"weights-{{name}}.safetensors")
    report = {{"losses": [s.loss for s in steps], "tokens": [s.tokens for s in steps], "processes": hardware.processes}}
    (Path(output) / f"report-{{name}}.json").write_text(json.dumps(report))
"""


def launch(folder: Path, base: Path, processes: int) -> None:
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable]
    if processes > 1:
        # `accelerate launch` starts this same module with GPUs; on CPUs it wants MPI
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(base), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and what two processes came to, in folders named so."""
    folder = tmp_path_factory.mktemp("runs")
    launch(folder / "one", tiny_bert, 1)
    launch(folder / "two", tiny_bert, 2)
    return folder


@pytest.mark.parametrize("recipe", ["sentence", "self-guided"])
@pytest.mark.parametrize("rank", [0, 1])
def test_loss_and_gradients_equal_those_of_one_process(runs: Path, recipe: str, rank: int) -> None:
    one = json.loads((runs / "one" / f"report-{recipe}0.json").read_text())
    two = json.loads((runs / "two" / f"report-{recipe}{rank}.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["tokens"] == one["tokens"]
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)  # AdamW multiplies the last bits
    expected = load_file(runs / "one" / f"gradients-{recipe}0.safetensors")
    for name, gradient in load_file(runs / "two" / f"gradients-{recipe}{rank}.safetensors").items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["sentence", "self-guided"])
def test_processes_end_in_the_same_weights_and_keep_all_generators(runs: Path, recipe: str) -> None:
    left, right = (load_file(runs / "two" / f"weights-{recipe}{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert load_file(runs / "two" / f"state-{recipe}")["generators"].shape[0] == 2
