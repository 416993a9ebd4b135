"""The tuning loop on a tiny random BERT."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import EngineError, InputError
from training.objective import LOSSES, Objective
from training.recipe import RECIPES, Device, Recipe, TuneConfig, TunePrecision
from training.reference import Reference
from training.source import resolve
from training.trainer import Hardware, Step, _groups, choose_hardware, steps_in, train

FP32 = Hardware(device=Device.CPU, precision=TunePrecision.FP32)
BF16 = Hardware(device=Device.CPU, precision=TunePrecision.BF16)
_LETTERS = random.Random(0)
TEXTS = [" ".join(_LETTERS.choices("abcdefghijklmnopqrstuvwxyz", k=4 + i % 20)) + f" {i % 10}" for i in range(40)]
SMALL = TuneConfig(batch_size=8, lr=1e-3, max_tokens=48)


def tuned(
    folder: Path, config: TuneConfig = SMALL, hardware: Hardware = FP32, pooling: Pooling = Pooling.MEAN
) -> tuple[Reference, list[Step]]:
    limit = config.max_tokens if pooling is Pooling.MEAN_PADDED else None
    reference = Reference.load(resolve(str(folder), pooling=pooling, max_tokens=limit))
    steps: list[Step] = []
    train(reference, TEXTS, config, hardware, steps.append)
    return reference, steps


def weights(reference: Reference) -> torch.Tensor:
    return torch.cat([value.flatten() for value in reference.model.state_dict().values()])


@pytest.mark.parametrize("hardware", [FP32, BF16])
def test_one_seed_gives_identical_weights_and_another_seed_others(tiny_bert: Path, hardware: Hardware) -> None:
    first, steps = tuned(tiny_bert, hardware=hardware)
    torch.rand(7)  # the state of the global generator before a run does not matter
    second, _ = tuned(tiny_bert, hardware=hardware)
    other, _ = tuned(tiny_bert, dataclasses.replace(SMALL, seed=43), hardware)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("pooling", list(Pooling))
def test_the_loss_falls(tiny_bert: Path, pooling: Pooling) -> None:
    config = dataclasses.replace(SMALL, epochs=16, temperature=0.1, lr=2e-3)
    reference, steps = tuned(tiny_bert, config, pooling=pooling)
    losses = [step.loss for step in steps]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert not reference.model.training


def test_without_dropout_and_mask_the_first_loss_is_that_of_two_equal_views(tiny_bert: Path) -> None:
    """The first step's loss is what the reference's vectors give, and texts that tokenise alike are no negatives."""
    texts = [*TEXTS, *(text.upper() for text in TEXTS[:3])]
    groups = torch.tensor([*range(len(TEXTS)), 0, 1, 2])
    config = dataclasses.replace(SMALL, batch_size=len(texts), mask_length=0, dropout=0.0)
    reference = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN, max_tokens=48))
    vectors = torch.from_numpy(reference.encode(texts))
    expected = LOSSES[Objective.MIRROR](vectors, vectors, config.temperature, groups).item()
    steps: list[Step] = []
    train(reference, texts, config, FP32, steps.append)
    assert steps[0].loss == pytest.approx(expected, rel=1e-4)
    assert steps[0].tokens == 2 * sum(map(len, reference.tokenizer(texts, truncation=True, max_length=48)["input_ids"]))


def test_bf16_is_close_to_fp32_and_is_used(tiny_bert: Path) -> None:
    (exact, exact_steps), (rough, rough_steps) = tuned(tiny_bert, hardware=FP32), tuned(tiny_bert, hardware=BF16)
    assert rough_steps[0].loss == pytest.approx(exact_steps[0].loss, rel=0.1)
    assert rough_steps[0].loss != exact_steps[0].loss
    assert rough.model.dtype is exact.model.dtype is torch.float32


def test_texts_that_tokenise_alike_share_a_group(tiny_bert: Path) -> None:
    tokenizer = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN)).tokenizer
    ids = tokenizer(["The cat", "the  CAT", "the dog"])["input_ids"]
    assert _groups(ids).tolist() == [0, 0, 1]


def test_every_weight_that_a_vector_depends_on_is_tuned(tiny_bert: Path) -> None:
    before = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN)).model.state_dict()
    after, _ = tuned(tiny_bert)
    same = [name for name, value in after.model.state_dict().items() if torch.equal(value, before[name])]
    assert same == []


def test_a_loss_that_is_not_finite_stops_the_run(tiny_bert: Path) -> None:
    with pytest.raises(InputError, match=r"(loss is nan at step \d|weights are not finite).*Lower --lr"):
        tuned(tiny_bert, dataclasses.replace(SMALL, lr=1e30))


def test_a_corpus_smaller_than_a_batch_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(InputError, match="40 distinct lines, fewer than one batch of 41"):
        tuned(tiny_bert, dataclasses.replace(SMALL, batch_size=41))


def test_a_tokenizer_without_mask_token_is_refused_unless_nothing_is_masked(tiny_bert: Path) -> None:
    reference = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN))
    reference.tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token: say --mask-length 0"):
        train(reference, TEXTS, SMALL, FP32, lambda _: None)
    train(reference, TEXTS, dataclasses.replace(SMALL, mask_length=0), FP32, lambda _: None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("temperature", -0.1),
        ("mask_length", -1),
        ("dropout", 1.0),
        ("max_tokens", 2),
        ("seed", -1),
    ],
)
def test_settings_that_make_no_sense_name_their_option(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is"):
        dataclasses.replace(SMALL, **{name: value})  # type: ignore[arg-type]


def test_recipes_are_the_published_ones() -> None:
    assert TuneConfig() == RECIPES[Recipe.SENTENCE]
    rows = {
        recipe: (c.epochs, c.max_tokens, c.mask_length, c.temperature, c.batch_size, c.lr)
        for recipe, c in RECIPES.items()
    }
    assert rows == {
        Recipe.SENTENCE: (1, 50, 5, 0.04, 200, 2e-5),
        Recipe.PHRASE: (2, 25, 2, 0.04, 200, 2e-5),
        Recipe.WORD: (2, 25, 0, 0.2, 200, 2e-5),
    }
    assert steps_in(10_000, RECIPES[Recipe.WORD]) == 100
    assert steps_in(9_255, RECIPES[Recipe.SENTENCE]) == 46


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="sees no NVIDIA GPU"):
        choose_hardware(Device.CUDA, TunePrecision.AUTO)
    assert choose_hardware(Device.AUTO, TunePrecision.FP32) == FP32
    assert choose_hardware(Device.CPU, TunePrecision.AUTO).precision is not TunePrecision.AUTO
