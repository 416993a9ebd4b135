"""Encoders that are trained for fewer components and fewer layers too."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.depth import at_depth, keep_layers
from encoders.reference import Reference
from encoders.source import resolve
from encoders.write import write_layout
from mirror_runtime.bundle import Pooling, read_encoder
from mirror_runtime.errors import BundleError, InputError
from tests.support.tuning import ANIMALS, TEACHER, load, tune
from training.checkpoint import Checkpoint
from training.elastic import check_elastic
from training.objective import match_teacher, nt_xent
from training.packed import encode_depths, pack
from training.recipe import Objective, TuneConfig
from training.tune import main

CONFIG = TuneConfig(batch_size=len(ANIMALS), max_tokens=48, mask_length=0, dropout=0.0, matryoshka=(8, 16), depths=(1,))


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert", "gemma3_text", "t5", "deberta-v2"])
def test_a_depth_is_transformers_encoder_of_as_many_layers(
    tiny_encoder: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    whole = load(tiny_encoder(family))
    shallow = keep_layers(whole, [0])
    packed = pack(whole.tokenizer(ANIMALS)["input_ids"], length=64, pad_id=whole.tokenizer.pad_token_id)
    with torch.no_grad():
        _, found = encode_depths(whole.model, packed, Pooling.MEAN, (-1,), (1,))
    expected = shallow.encode_unnormalized(ANIMALS)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    write_layout(tmp_path, model=shallow.model, tokenizer=shallow.tokenizer, spec=shallow.spec, card="")
    np.testing.assert_allclose(Reference.load(resolve(str(tmp_path))).encode_unnormalized(ANIMALS), expected, atol=1e-6)
    weights = [sum(value.numel() for value in one.model.parameters()) for one in (whole, shallow)]
    assert weights[1] < weights[0]
    assert abs(found - torch.from_numpy(whole.encode_unnormalized(ANIMALS))).max() > 0.01


@pytest.mark.parametrize("rows", [None, 96])
def test_the_loss_is_the_mean_over_depths_and_components_and_what_the_depth_lacks(tiny_bert, rows):
    whole = load(tiny_bert, max_tokens=48)
    depths = [torch.from_numpy(one.encode_unnormalized(ANIMALS)) for one in (whole, keep_layers(whole, [0]))]
    groups = torch.arange(len(ANIMALS))
    losses = [nt_xent(v[:, :dim], v[:, :dim], 0.04, groups) for v in depths for dim in (8, 16, 32)]
    twice = [torch.repeat_interleave(one, 2, dim=0) for one in depths]
    expected = torch.stack(losses).mean() + match_teacher(twice[1], twice[0], 0.04, groups.repeat_interleave(2))
    _, (step,) = tune(tiny_bert, ANIMALS, dataclasses.replace(CONFIG, micro_batch_tokens=rows))
    assert step.loss == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_is_learnt_at_every_depth_and_by_the_first_components(tiny_bert: Path, tmp_path: Path) -> None:
    """A killed run resumes exactly, and afterwards each part is nearer to the teacher than without its own loss."""
    targets = torch.from_numpy(load(tiny_bert, Pooling.CLS).encode_unnormalized(ANIMALS)).roll(5, dims=1)
    groups = torch.arange(len(ANIMALS))
    plain = dataclasses.replace(TEACHER, batch_size=8, max_tokens=48, epochs=12, lr=2e-3)
    config = dataclasses.replace(plain, matryoshka=(8,), depths=(1,))
    elastic, _ = tune(tiny_bert, ANIMALS, config, targets=targets)

    def kill(step: object) -> None:
        if getattr(step, "step", 0) == 21:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(path=tmp_path / "state", every=10)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_bert, ANIMALS, config, targets=targets, checkpoint=checkpoint, on_step=kill)
    resumed, _ = tune(tiny_bert, ANIMALS, config, targets=targets, checkpoint=checkpoint)
    other, _ = tune(tiny_bert, ANIMALS, plain, targets=targets)
    for dim, depth in ((8, 2), (32, 1), (8, 1)):
        parts = [keep_layers(one, range(depth)).encode_unnormalized(ANIMALS) for one in (elastic, resumed, other)]
        np.testing.assert_array_equal(parts[0], parts[1])
        ours, theirs = (match_teacher(torch.from_numpy(part[:, :dim]), targets, 0.05, groups) for part in parts[::2])
        assert ours < theirs


def test_a_run_folder_records_what_it_was_trained_for_and_another_run_forgets_it(
    tiny_bert: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n".join(ANIMALS))
    options = ["--corpus", str(corpus), "--probe", "none", "--batch-size", "8", "--device", "cpu", "--max-tokens", "48"]
    first, second = tmp_path / "first", tmp_path / "second"
    trained = ["--matryoshka", "32", "16", "8", "--depths", "2", "1"]
    assert main(["--base", str(tiny_bert), "--pooling", "mean", *trained, *options, "--output", str(first)]) == 0
    assert ((spec := read_encoder(first)).trained_dims, spec.trained_depths) == ((8, 16), (1,))
    assert "| also trained for | the first 8, 16 numbers; 1 layers |" in (first / "README.md").read_text()
    whole = Reference.load(resolve(str(first)))
    assert at_depth(whole, 2) is whole
    assert (at_depth(whole, 1).spec.trained_depths, at_depth(whole, 1).spec.trained_dims) == ((), (8, 16))
    with pytest.raises(InputError, match=r"--depth 3: tiny-bert was trained for 1, 2$"):
        at_depth(whole, 3)
    assert main(["--base", str(first), *options, "--output", str(second)]) == 0
    assert not {"trained_dims", "trained_depths"} & json.loads((second / "encoder.json").read_text()).keys()
    with pytest.raises(InputError, match=r"--depth 1: .* was trained for 2 alone: tune\.py"):
        at_depth(Reference.load(resolve(str(second))), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matryoshka": (64,)}, "--matryoshka 64: the encoder's vectors have 32 components"),
        ({"depths": (3,)}, "--depths 3: the encoder has 2 layers"),
        ({"layers": (-3, -1)}, "--depths 1: the encoder pools layer -3, which it would lack"),
        ({"train_layers": 1}, "--train-layers 1 leaves the first 1 layers as they are, and so depth 1"),
        ({"objective": Objective.SELF_GUIDED}, "--matryoshka and --depths do not go with --objective self-guided"),
        ({"objective": Objective.ANGLE, "matryoshka": (9,)}, "--matryoshka must have even numbers"),
        ({"matryoshka": (0,)}, "--matryoshka is"),
        ({"depths": (0,)}, "--depths is"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error(tiny_bert: Path, changes: dict, message: str) -> None:
    reference = load(tiny_bert)
    spec = dataclasses.replace(reference.spec, layers=changes.pop("layers", (-1,)))
    with pytest.raises(InputError, match=message):
        check_elastic(dataclasses.replace(reference, spec=spec), dataclasses.replace(CONFIG, **changes))


def test_shared_and_unknown_layers_and_a_head_that_reads_them_are_refused(tiny_encoder, tiny_bert) -> None:
    with pytest.raises(InputError, match="family albert shares its layers' weights"):
        check_elastic(albert := load(tiny_encoder("albert")), CONFIG)
    reference = load(tiny_bert)
    for one, layers, message in (
        (albert, [0], "has no layers of their own weights"),
        (reference, [], "has layers 0 to 1"),
        (reference, [2], "layers 2: tiny-bert has layers 0 to 1"),
        (reference, [1, 0], "in ascending order"),
    ):
        with pytest.raises(InputError, match=message):
            keep_layers(one, layers)
    spec = dataclasses.replace(reference.spec, layers=(2,))
    with pytest.raises(InputError, match="reads layer 1"):
        keep_layers(dataclasses.replace(reference, spec=spec), [0])
    with pytest.raises(BundleError, match="records that it was trained for"):
        dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, trained_depths=(2,)))
