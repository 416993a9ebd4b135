"""Several processes that share a batch compute what one process computes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import training_worker
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # torchrun starts two processes that import torch

each_recipe = pytest.mark.parametrize("recipe", training_worker.RUNS)


@pytest.fixture(scope="module")
def one(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    training_worker.share(tiny_bert, folder)
    return folder


@pytest.fixture(scope="module")
def launched(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """The output folder of two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    corpus = folder / "text.txt"
    corpus.write_text("\n".join(training_worker.SHARED_TEXTS[:20]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `accelerate launch` starts this same module with GPUs; on CPUs it needs MPI
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = [*launcher, training_worker.__file__, str(tiny_bert), str(folder), str(corpus)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done


@each_recipe
@pytest.mark.parametrize("rank", [0, 1])
def test_loss_and_gradients_equal_those_of_one_process(one, launched, recipe: str, rank: int) -> None:
    two, _ = launched
    single = json.loads((one / f"{recipe}0.json").read_text())
    report = json.loads((two / f"{recipe}{rank}.json").read_text())
    assert (single["processes"], report["processes"]) == (1, 2)
    assert report["tokens"] == single["tokens"]
    assert report["losses"][0] == pytest.approx(single["losses"][0], rel=1e-6)
    assert report["losses"] == pytest.approx(single["losses"], rel=1e-4)  # AdamW multiplies the last bits
    expected = load_file(one / f"{recipe}0.safetensors")
    gradients = load_file(two / f"{recipe}{rank}.safetensors")
    assert gradients.keys() == expected.keys() > {"0", "weights"}
    for name in gradients.keys() - {"weights"}:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-6, rtol=1e-5)


@each_recipe
def test_processes_end_in_the_same_weights_and_keep_all_generators(launched, recipe: str) -> None:
    folder, _ = launched
    left, right = (load_file(folder / f"{recipe}{rank}.safetensors")["weights"] for rank in (0, 1))
    assert torch.equal(left, right)
    assert load_file(folder / f"state-{recipe}")["generators"].shape[0] == 2


def test_one_of_two_processes_writes_and_prints(launched) -> None:
    folder, done = launched
    assert json.loads(done.stdout)["processes"] == 2
    assert done.stderr.count("Wrote ") == 1
    assert (folder / "run" / "encoder.json").is_file()
    assert not list(folder.glob(".run*"))
