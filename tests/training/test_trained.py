"""What is trained: last layers alone, and low-rank additions that are merged."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from encoders.write import write_layout
from mirror_runtime.errors import InputError
from tests.support.tuning import ANIMALS, FP32, load, tune
from training.checkpoint import Checkpoint
from training.recipe import TuneConfig
from training.trained import SCALE, LowRank, check_trained, trained_parts
from training.trainer import train

pytestmark = pytest.mark.tunes

SMALL = TuneConfig(batch_size=8, lr=1e-3, max_tokens=48)
LAST = "encoder.layer.1."


def changed(folder: Path, config: TuneConfig) -> set[str]:
    before = load(folder).model.state_dict()
    after = tune(folder, ANIMALS, config)[0].model
    assert all(parameter.requires_grad for parameter in after.parameters())
    assert set(after.state_dict()) == set(before), "a plain model again"
    return {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}


def test_only_the_last_layers_move(tiny_bert: Path) -> None:
    names = set(load(tiny_bert).model.state_dict())
    assert changed(tiny_bert, dataclasses.replace(SMALL, train_layers=1)) == {n for n in names if n.startswith(LAST)}
    matrices = {n for n in names if ".layer." in n and n.endswith(".weight") and "LayerNorm" not in n}
    assert changed(tiny_bert, dataclasses.replace(SMALL, lora=2)) == matrices
    both = dataclasses.replace(SMALL, lora=2, train_layers=1)
    assert changed(tiny_bert, both) == {n for n in matrices if n.startswith(LAST)}


def test_frozen_layers_have_no_graph_and_no_dropout(tiny_bert: Path) -> None:
    model = load(tiny_bert).model.train()
    with trained_parts(model, 1, None):
        first, last = model.encoder.layer
        assert (model.embeddings.training, first.training, last.training) == (False, False, True)
        states = model(input_ids=torch.tensor([[2, 5, 3]]), output_hidden_states=True).hidden_states
        assert [state.requires_grad for state in states] == [False, False, True]


def test_the_merged_weights_are_base_plus_product_and_compute_what_was_tuned(tiny_bert: Path) -> None:
    model = load(tiny_bert).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, expected = torch.tensor([[2, 5, 6, 3]]), {}
    with trained_parts(model, None, 2):
        for name, module in model.named_modules():
            if isinstance(module, LowRank):
                torch.nn.init.normal_(module.up.weight)
                expected[f"{name}.weight"] = SCALE * module.up.weight @ module.down.weight
        tuned = model(input_ids=ids).last_hidden_state
    assert len(expected) == 12
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] + expected.get(name, 0))
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, tuned, atol=1e-4, rtol=1e-4)


def test_a_folder_has_the_bytes_of_weights_merged_by_hand(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=tmp_path / "state", every=1)
    tuned, _ = tune(tiny_bert, ANIMALS, dataclasses.replace(SMALL, lora=4, lr=1e-2), checkpoint=checkpoint)
    state, weights = load_file(checkpoint.path), {}
    for path, value in state.items():
        stem, _, name = path.removeprefix("model.").partition(".base.")
        if path.startswith("model.") and name == "weight":
            product = state[f"model.{stem}.up.weight"] @ state[f"model.{stem}.down.weight"]
            weights[f"{stem}.weight"] = value + SCALE * product
        elif path.startswith("model.") and not stem.endswith((".up.weight", ".down.weight")):
            weights[".".join(filter(None, (stem, name)))] = value
    by_hand = load(tiny_bert)
    by_hand.model.load_state_dict(weights)
    for name, one in (("tuned", tuned), ("by_hand", by_hand)):
        write_layout(tmp_path / name, model=one.model, tokenizer=one.tokenizer, spec=one.spec, card="")
    files = [file.relative_to(tmp_path / "tuned") for file in (tmp_path / "tuned").rglob("*") if file.is_file()]
    assert {str(file) for file in files} > {"model.safetensors", "encoder.json"}
    for file in files:
        assert (tmp_path / "tuned" / file).read_bytes() == (tmp_path / "by_hand" / file).read_bytes()


@pytest.mark.parametrize(
    ("layers", "rank", "pooled", "message"),
    [
        (3, None, (-1,), "--train-layers is 3, and the encoder has 2 layers"),
        (1, None, (0, 1), "--train-layers is 1, and the encoder pools layers below those"),
        (None, 17, (-1,), "--lora is 17: above 16"),
    ],
)
def test_what_cannot_be_trained_is_named(tiny_bert, layers, rank, pooled, message):
    model = load(tiny_bert).model
    check_trained(model, 1, 16, (0, 2))
    with pytest.raises(InputError, match=message):
        check_trained(model, layers, rank, pooled)


def test_layers_that_share_weights_are_not_told_apart(tiny_bert: Path) -> None:
    reference = load(tiny_bert)
    layers: Any = reference.model.get_submodule("encoder.layer")
    layers[1] = layers[0]
    with pytest.raises(InputError, match="this encoder shares them"):
        train(reference, ANIMALS, dataclasses.replace(SMALL, train_layers=1), FP32, lambda step: None)
