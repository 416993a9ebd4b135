"""A killed run resumes exactly."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mirror_runtime.errors import InputError
from tests.support.tuning import ANIMALS, FP32, PAIRS, SCORED, TARGETS, TEACHER, TRIPLETS, load, tune, weights
from training.augment import Example
from training.checkpoint import Checkpoint, State, Step, fingerprint
from training.recipe import RECIPES, Objective, Recipe, TuneConfig
from training.trainer import train

pytestmark = pytest.mark.tunes

MIRROR = TuneConfig(batch_size=8, lr=1e-3, max_tokens=48, epochs=2, drophead=0.2)
GUIDED = dataclasses.replace(RECIPES[Recipe.SELF_GUIDED], batch_size=8, max_tokens=48, epochs=2)


class Killed(BaseException):
    """Stands for SIGKILL: a run that saved its state while it ends would be seen at step 2."""


SMALL: dict[str, Any] = {"batch_size": 8, "max_tokens": 48, "epochs": 2}
RUNS: dict[str, tuple[Sequence[Example], TuneConfig, torch.Tensor | None]] = {
    "repetition": (ANIMALS, dataclasses.replace(MIRROR, repetition=0.5), None),
    "self-guided": (ANIMALS, GUIDED, None),
    "pieces": (ANIMALS, dataclasses.replace(MIRROR, micro_batch_tokens=64), None),
    "negatives": (TRIPLETS, dataclasses.replace(MIRROR, lora=4, train_layers=1), None),
    "angle": (PAIRS, dataclasses.replace(SCORED, **SMALL, objective=Objective.ANGLE), None),
    "teacher": (ANIMALS, dataclasses.replace(TEACHER, **SMALL, dropout=0.1), TARGETS),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("die_at", [2, 5])
def test_a_stopped_run_ends_in_the_weights_of_an_undisturbed_one(tiny_bert, tmp_path, monkeypatch, name, die_at):
    data, config, targets = RUNS[name]

    def die(step: Step) -> None:
        if step.step == die_at:
            raise Killed

    monkeypatch.setattr("training.self_guided.HEAD_WIDTH", 32)
    checkpoint = Checkpoint(path=tmp_path / "state", every=3)
    with pytest.raises(Killed):
        tune(tiny_bert, data, config, checkpoint=checkpoint, on_step=die, targets=targets)
    assert checkpoint.path.exists() == (die_at > 3)
    resumed, steps = tune(tiny_bert, data, config, checkpoint=checkpoint, targets=targets)
    undisturbed, expected = tune(tiny_bert, data, config, targets=targets)
    assert [(s.step, s.loss, s.tokens) for s in steps] == [(s.step, s.loss, s.tokens) for s in expected]
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_finished_checkpoint_returns_the_same_result(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=tmp_path / "state", every=8)
    (first, steps), (second, again) = (tune(tiny_bert, ANIMALS, MIRROR, checkpoint=checkpoint) for _ in range(2))
    assert len(steps) == 8
    assert steps == again
    assert torch.equal(weights(first), weights(second))


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=tmp_path / "state", every=4)
    tune(tiny_bert, ANIMALS, MIRROR, checkpoint=checkpoint)
    before = checkpoint.path.read_bytes()
    with pytest.raises(InputError, match=r"another run \(lr was 0.001, is 0.002; seed was 42, is 1\)"):
        tune(tiny_bert, ANIMALS, dataclasses.replace(MIRROR, lr=2e-3, seed=1), checkpoint=checkpoint)
    with pytest.raises(InputError, match=r"another run \(corpus was \w+, is \w+\)"):
        tune(tiny_bert, [*ANIMALS[1:], "else"], MIRROR, checkpoint=checkpoint)
    reference = load(tiny_bert)
    with torch.no_grad():
        reference.model.get_parameter("encoder.layer.0.output.dense.bias")[0] += 1
    with pytest.raises(InputError, match=r"another run \(base was"):
        train(reference, ANIMALS, MIRROR, FP32, lambda _: None, checkpoint)
    assert checkpoint.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"junk" * 100, None])
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    checkpoint = Checkpoint(path=tmp_path / "state", every=1)
    if content is None:
        checkpoint.save(State(tensors={"a": torch.ones(1)}, steps=()), {})
        content = checkpoint.path.read_bytes()[:-2]
    checkpoint.path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        checkpoint.load({})


def test_a_state_survives_the_round_trip_and_cannot_be_written_to_an_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--checkpoint-every is 0"):
        Checkpoint(path=tmp_path, every=0)
    checkpoint = Checkpoint(path=tmp_path / "state", every=1)
    assert checkpoint.load({}) is None
    state = State(
        tensors={"half": torch.randn(3).bfloat16(), "bytes": torch.arange(5, dtype=torch.uint8)},
        steps=(Step(step=1, loss=0.1 + 0.2, tokens=7, seconds=0.5),),
    )
    with pytest.raises(InputError, match="check the path"):
        Checkpoint(path=tmp_path / "absent" / "state", every=1).save(state, {})
    checkpoint.save(state, {"lr": 2e-5, "layers": (-1,)})
    loaded = checkpoint.load({"lr": 2e-5, "layers": (-1,)})
    assert loaded is not None
    assert loaded.steps == state.steps
    assert all(torch.equal(loaded.tensors[name], value) for name, value in state.tensors.items())
    assert fingerprint([b"ab", b"c"]) != fingerprint([b"a", b"bc"])
