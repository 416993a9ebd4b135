"""A killed run goes on as if nothing had happened."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from encoders.reference import Reference
from encoders.source import resolve
from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import InputError
from tests.support.paths import ROOT
from training.checkpoint import Checkpoint, State, Step, fingerprint
from training.recipe import RECIPES, Device, Recipe, TuneConfig, TunePrecision
from training.trainer import Hardware, train

FP32 = Hardware(device=Device.CPU, precision=TunePrecision.FP32)
TEXTS = [f"the {animal} no. {i} is playing a guitar" for i in range(8) for animal in ("cat", "dog", "man", "river")]
MIRROR = TuneConfig(batch_size=8, lr=1e-3, max_tokens=48, epochs=2, drophead=0.2)
GUIDED = dataclasses.replace(RECIPES[Recipe.SELF_GUIDED], batch_size=8, max_tokens=48, epochs=2)


class Killed(BaseException):
    """Stands for SIGKILL."""


def run(
    folder: Path, config: TuneConfig, checkpoint: Checkpoint | None, die_at: int | None = None
) -> tuple[dict[str, torch.Tensor], list[Step]]:
    reference = Reference.load(resolve(str(folder), pooling=Pooling.MEAN))
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        if step.step == die_at:
            raise Killed
        steps.append(step)

    train(reference, TEXTS, config, FP32, on_step, checkpoint)
    return dict(reference.model.state_dict()), steps


@pytest.mark.parametrize(
    "config", [dataclasses.replace(MIRROR, repetition=0.5), GUIDED, dataclasses.replace(MIRROR, micro_batch_tokens=64)]
)
@pytest.mark.parametrize("die_at", [2, 5])
def test_a_run_that_died_ends_in_the_weights_of_an_undisturbed_one(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TuneConfig, die_at: int
) -> None:
    monkeypatch.setattr("training.self_guided.HEAD_WIDTH", 32)
    expected, expected_steps = run(tiny_bert, config, None)
    checkpoint = Checkpoint(path=tmp_path / "state", every=3)
    with pytest.raises(Killed):
        run(tiny_bert, config, checkpoint, die_at)
    assert checkpoint.path.exists() == (die_at > 3)
    weights, steps = run(tiny_bert, config, checkpoint)
    assert [(step.step, step.loss, step.tokens) for step in steps] == [
        (step.step, step.loss, step.tokens) for step in expected_steps
    ]
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    checkpoint.remove()
    assert not checkpoint.path.exists()


def test_a_finished_checkpoint_gives_the_end_again(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=tmp_path / "state", every=8)
    (first, steps), (second, again) = run(tiny_bert, MIRROR, checkpoint), run(tiny_bert, MIRROR, checkpoint)
    assert len(steps) == 8
    assert steps == again
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_other_settings_is_refused_and_says_which(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=tmp_path / "state", every=4)
    run(tiny_bert, MIRROR, checkpoint)
    before = checkpoint.path.read_bytes()
    with pytest.raises(InputError, match=r"another run \(lr was 0.001, is 0.002; seed was 42, is 1\)"):
        run(tiny_bert, dataclasses.replace(MIRROR, lr=2e-3, seed=1), checkpoint)
    reference = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN))
    with pytest.raises(InputError, match=r"another run \(corpus was \w+, is \w+\)"):
        train(reference, [*TEXTS[1:], "else"], MIRROR, FP32, lambda _: None, checkpoint)
    with torch.no_grad():
        reference.model.get_parameter("encoder.layer.0.output.dense.bias")[0] += 1
    with pytest.raises(InputError, match=r"another run \(base was"):
        train(reference, TEXTS, MIRROR, FP32, lambda _: None, checkpoint)
    assert checkpoint.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"junk" * 100, None])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    checkpoint = Checkpoint(path=tmp_path / "state", every=1)
    if content is None:
        checkpoint.save(State(tensors={"a": torch.ones(1)}, steps=()), {})
        content = checkpoint.path.read_bytes()[:-2]
    checkpoint.path.write_bytes(content)
    with pytest.raises(InputError, match="is no checkpoint that can be read"):
        checkpoint.load({})


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=tmp_path / "absent" / "state", every=1)
    with pytest.raises(InputError, match="cannot be written"):
        checkpoint.save(State(tensors={"a": torch.ones(1)}, steps=()), {})
    with pytest.raises(InputError, match="--checkpoint-every is 0"):
        Checkpoint(path=tmp_path, every=0)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=tmp_path / "state", every=1)
    assert checkpoint.load({}) is None
    state = State(
        tensors={"half": torch.randn(3).bfloat16(), "bytes": torch.arange(5, dtype=torch.uint8)},
        steps=(Step(step=1, loss=0.1 + 0.2, tokens=7, seconds=0.5),),
    )
    checkpoint.save(state, {"lr": 2e-5, "layers": (-1,)})
    loaded = checkpoint.load({"lr": 2e-5, "layers": (-1,)})
    assert loaded is not None
    assert loaded.steps == state.steps
    assert all(torch.equal(loaded.tensors[name], value) for name, value in state.tensors.items())


def test_no_two_corpora_share_a_fingerprint_by_where_they_are_cut() -> None:
    assert fingerprint([b"ab", b"c"]) != fingerprint([b"a", b"bc"])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.training.test_checkpoint import *
checkpoint = Checkpoint(path=Path({path!r}), every=1)
reference = Reference.load(resolve({base!r}, pooling=Pooling.MEAN))
die = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step.step == 4 else None
train(reference, TEXTS, MIRROR, FP32, die, checkpoint)
"""


def test_a_process_that_was_really_killed_is_resumed(tiny_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "state"
    script = KILLED.format(root=str(ROOT), path=str(path), base=str(tiny_bert))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    weights, steps = run(tiny_bert, MIRROR, Checkpoint(path=path, every=100))
    expected, _ = run(tiny_bert, MIRROR, None)
    assert len(steps) == 8
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
