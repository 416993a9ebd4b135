"""The tuning loop on a tiny random BERT."""

import dataclasses
import random
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from encoders.reference import Reference
from mirror_runtime.bundle import Ditto, Pooling
from mirror_runtime.errors import EngineError, InputError
from tests.support.tuning import FP32, load, tune, weights
from training.augment import Document, Example, MaskViews
from training.batches import batches, group
from training.checkpoint import Step
from training.documents import View
from training.hardware import Hardware, choose_hardware
from training.objective import nt_xent
from training.packed import POOLINGS
from training.recipe import IMPLIED, RECIPES, Device, Objective, Recipe, Schedule, TuneConfig, TunePrecision, Variant
from training.self_guided import SelfGuided
from training.teacher import add_dense
from training.trainer import learning_rate, steps_in, train

pytestmark = pytest.mark.tunes

BF16 = Hardware(device=Device.CPU, precision=TunePrecision.BF16)
_LETTERS = random.Random(0)
TEXTS = [" ".join(_LETTERS.choices("abcdefghijklmnopqrstuvwxyz", k=4 + i % 20)) + f" {i % 10}" for i in range(40)]
SAME = (View.SAME,)
SMALL = TuneConfig(batch_size=8, lr=1e-3, max_tokens=48)


def tuned(folder: Path, config: TuneConfig = SMALL, **options: Any) -> tuple[Reference, list[Step]]:
    return tune(folder, TEXTS, config, **options)


def first_step(reference: Reference, data: Sequence[Example], config: TuneConfig) -> Step:
    steps: list[Step] = []
    train(reference, data, config, FP32, steps.append)
    return steps[0]


@pytest.mark.parametrize("hardware", [FP32, BF16])
def test_one_seed_gives_identical_weights_and_another_seed_others(tiny_bert: Path, hardware: Hardware) -> None:
    first, steps = tuned(tiny_bert, hardware=hardware)
    torch.rand(7)  # the state of the global generator before a run does not matter
    second, _ = tuned(tiny_bert, hardware=hardware)
    other, _ = tuned(tiny_bert, dataclasses.replace(SMALL, seed=43), hardware=hardware)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))
    before = load(tiny_bert).model.state_dict()
    assert not [name for name, value in first.model.state_dict().items() if torch.equal(value, before[name])]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_loss_falls(tiny_bert: Path, pooling: Pooling) -> None:
    config = dataclasses.replace(SMALL, epochs=8, temperature=0.1, lr=4e-3)
    reference, steps = tuned(tiny_bert, config, pooling=pooling)
    losses = [step.loss for step in steps]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert not reference.model.training


def test_without_dropout_and_mask_the_first_loss_is_that_of_two_equal_views(tiny_bert: Path) -> None:
    """The first step's loss is what the reference's vectors give, and texts with equal tokens are not negatives."""
    texts = [*TEXTS, *(text.upper() for text in TEXTS[:3])]
    groups = torch.tensor([*range(len(TEXTS)), 0, 1, 2])
    config = dataclasses.replace(SMALL, batch_size=len(texts), mask_length=0, dropout=0.0)
    reference = load(tiny_bert, max_tokens=48)
    vectors = torch.from_numpy(reference.encode(texts))
    expected = nt_xent(vectors, vectors, config.temperature, groups).item()
    step = first_step(reference, texts, config)
    assert step.loss == pytest.approx(expected, rel=1e-4)
    assert step.tokens == 2 * sum(map(len, reference.tokenizer(texts, truncation=True, max_length=48)["input_ids"]))


def test_bf16_is_close_to_fp32_and_is_used(tiny_bert: Path) -> None:
    (exact, exact_steps), (rough, rough_steps) = tuned(tiny_bert, hardware=FP32), tuned(tiny_bert, hardware=BF16)
    assert rough_steps[0].loss == pytest.approx(exact_steps[0].loss, rel=0.1)
    assert rough_steps[0].loss != exact_steps[0].loss
    assert rough.model.dtype is exact.model.dtype is torch.float32


def test_examples_that_share_a_text_share_a_group(tiny_bert: Path) -> None:
    ids = load(tiny_bert).tokenizer(["The cat", "the  CAT", "the dog"])["input_ids"]
    assert group(ids).tolist() == [0, 0, 2]
    a, b, c, d, e = ([token] for token in range(5))
    assert group([a, b, c], [d, d, e]).tolist() == [0, 0, 2]
    assert group([a, b, c], [b, c, d]).tolist() == [0, 0, 0]
    assert group([a, b, c], [a, b, c]).tolist() == [0, 1, 2]
    assert group([a, b, a], [c, d, d]).tolist() == [0, 0, 0]


def test_an_unsupported_head_is_refused_and_no_mask_token_unless_nothing_is_masked(tiny_bert: Path) -> None:
    reference = load(tiny_bert)
    reference.tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token: set --mask-length 0"):
        first_step(reference, TEXTS, SMALL)
    with pytest.raises(InputError, match="no mask token: set --mask-length 0"):
        first_step(reference, [Document("a title", text) for text in TEXTS], dataclasses.replace(SMALL, views=SAME))
    first_step(reference, TEXTS, dataclasses.replace(SMALL, mask_length=0))
    spec = dataclasses.replace(reference.spec, pooling=Pooling.DITTO, ditto=Ditto(layer=0, head=0))
    with pytest.raises(InputError, match="an encoder with pooling ditto cannot be tuned"):
        first_step(dataclasses.replace(reference, spec=spec), TEXTS, SMALL)


@pytest.mark.parametrize(
    "setting",
    [
        *("epochs=0", "batch_size=1", "lr=0", "lr=nan", "temperature=-0.1", "mask_length=-1", "dropout=1", "drift=-1"),
        *("warmup=1", "beta2=1", "weight_decay=inf", "clip=0", "drophead=1", "max_tokens=2", "micro_batch_tokens=47"),
        "seed=-1",
    ],
)
def test_invalid_settings_name_their_option(setting: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is"):
        dataclasses.replace(SMALL, **{name: float(value)})  # type: ignore[arg-type]


def test_a_dense_layer_that_is_not_finite_is_refused(tiny_bert: Path) -> None:
    def spoil(step: Step) -> None:
        with torch.no_grad():
            next(reference.dense[0].parameters())[0, 0] = float("nan")

    reference = add_dense(load(tiny_bert), 48, 1)
    with pytest.raises(InputError, match="weights are not finite at the end"):
        train(reference, TEXTS[:8], SMALL, FP32, spoil)


def test_recipes_are_the_published_ones() -> None:
    assert TuneConfig() == RECIPES[Recipe.SENTENCE]
    names = ("epochs", "max_tokens", "mask_length", "temperature", "batch_size", "lr")
    assert {recipe: attrgetter(*names)(config) for recipe, config in RECIPES.items()} == {
        Recipe.SENTENCE: (1, 50, 5, 0.04, 200, 2e-5),
        Recipe.PHRASE: (2, 25, 2, 0.04, 200, 2e-5),
        Recipe.WORD: (2, 25, 0, 0.2, 200, 2e-5),
        Recipe.SELF_GUIDED: (1, 128, 0, 0.01, 16, 5e-5),
        Recipe.MIRROR_PLUS: (1, 50, 5, 0.05, 200, 2e-5),
        Recipe.MIRROR_CLS: (1, 50, 5, 0.03, 200, 3e-5),
        Recipe.DOCUMENTS: (1, 96, 0, 0.05, 64, 2e-5),
        Recipe.HYBRID: (3, 96, 0, 0.05, 64, 6e-5),
        Recipe.SCORED: (2, 64, 0, 0.05, 64, 1e-4),
        Recipe.TEACHER: (3, 64, 0, 0.05, 128, 3e-4),
    }
    assert all(RECIPES[recipe].objective is objective for objective, recipe in IMPLIED.items() if objective != "angle")
    assert [recipe for recipe, c in RECIPES.items() if c.repetition] == [Recipe.MIRROR_PLUS]
    guided = RECIPES[Recipe.SELF_GUIDED]
    assert (guided.objective, guided.variant, guided.drift) == (Objective.SELF_GUIDED, Variant.OPT3, 0.1)
    assert (guided.schedule, guided.warmup, guided.beta2) == (Schedule.LINEAR, 0.1, 0.9)
    assert (guided.weight_decay, guided.clip) == (0.0, 1.0)
    assert steps_in(10_000, RECIPES[Recipe.WORD]) == 100
    assert steps_in(9_255, RECIPES[Recipe.SENTENCE]) == 46


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="finds no NVIDIA GPU"):
        choose_hardware(Device.CUDA, TunePrecision.AUTO)
    assert choose_hardware(Device.AUTO, TunePrecision.FP32) == FP32
    assert choose_hardware(Device.CPU, TunePrecision.AUTO).precision is not TunePrecision.AUTO


GUIDED = dataclasses.replace(RECIPES[Recipe.SELF_GUIDED], batch_size=8, max_tokens=48, epochs=6, lr=1e-3)


@pytest.mark.parametrize("variant", list(Variant))
def test_self_guided_tuning_lowers_the_loss_and_leaves_the_embeddings_alone(tiny_bert, monkeypatch, variant):
    monkeypatch.setattr("training.self_guided.HEAD_WIDTH", 64)
    config = dataclasses.replace(GUIDED, variant=variant, temperature=0.05)
    reference, steps = tuned(tiny_bert, config, pooling=Pooling.CLS)
    losses = [step.loss for step in steps]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    before = load(tiny_bert, Pooling.CLS).model.state_dict()
    same = {name for name, value in reference.model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith("embeddings.")}
    assert all(parameter.requires_grad for parameter in reference.model.parameters())


def test_the_first_self_guided_loss_is_that_of_hugging_faces_layers(tiny_bert, monkeypatch):
    """Without dropout, both the vectors and the frozen copy's layers come from the weights at the start."""
    monkeypatch.setattr("training.self_guided.HEAD_WIDTH", 64)
    config = dataclasses.replace(GUIDED, batch_size=len(TEXTS), dropout=0.0)
    reference = load(tiny_bert, Pooling.CLS)
    batch = reference.tokenizer(TEXTS, padding=True, truncation=True, max_length=48, return_tensors="pt")
    mask = batch["attention_mask"][:, :, None]
    with torch.no_grad():
        states = reference.model(**batch, output_hidden_states=True).hidden_states
        views = torch.stack([state.masked_fill(mask == 0, -1e9).amax(dim=1) for state in states], dim=1)
        torch.manual_seed(config.seed)
        guide = SelfGuided(reference.model, Variant.OPT3, config.temperature, config.drift)
        loss = guide.loss(states[-1][:, 0], views, torch.arange(len(TEXTS)))
    assert first_step(reference, TEXTS, config).loss == pytest.approx(loss.item(), rel=1e-4)


def test_drift_is_the_squared_distance_from_the_start_with_its_gradient(tiny_bert: Path) -> None:
    model = load(tiny_bert, Pooling.CLS).model
    guide = SelfGuided(model, Variant.OPT3, 0.01, 0.25)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
            parameter.grad = torch.zeros_like(parameter)
    penalty = guide.add_drift()
    found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    moved = torch.cat([(now - then).flatten() for now, then in zip(parameters, start, strict=True)])
    expected = 0.25 * moved.square().sum()
    assert penalty == pytest.approx(expected.item(), rel=1e-5)
    for gradient, right in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, right)


def test_pairs_are_the_two_views_and_nothing_is_masked(tiny_bert: Path) -> None:
    pairs = [(text, f"{text} and a guitar by the river") for text in TEXTS]
    config = dataclasses.replace(SMALL, batch_size=len(pairs), dropout=0.0)
    reference = load(tiny_bert, max_tokens=48)
    reference.tokenizer.mask_token = None
    sides = [torch.from_numpy(reference.encode(list(side))) for side in zip(*pairs, strict=True)]
    expected = nt_xent(sides[0], sides[1], config.temperature, torch.arange(len(pairs))).item()
    assert first_step(reference, pairs, config).loss == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match="single texts, not from pairs"):
        first_step(reference, pairs, dataclasses.replace(GUIDED, mask_length=0))


def views(folder: Path, documents: bool = False, **settings: object) -> list[tuple[str, str]]:
    """Return the views of one batch as text."""
    reference = load(folder)
    texts: list[Example] = [f"the cat no. {i} is playing the guitar" for i in range(8)]
    texts = [Document("a title of eight words that no other has", str(text)) for text in texts] if documents else texts
    (batch,) = batches(reference, texts, dataclasses.replace(SMALL, **settings), FP32)  # type: ignore[arg-type]
    pieces = [batch.packed.input_ids[batch.packed.text_ids == text + 1] for text in range(16)]
    decoded = [str(reference.tokenizer.decode(piece)) for piece in pieces]
    return list(zip(decoded[:8], decoded[8:], strict=True))


def test_masking_is_of_the_second_view_of_both_or_by_the_letter_and_repetition_of_the_second(tiny_bert: Path) -> None:
    assert all("[MASK]" not in first and "[MASK]" in second for first, second in views(tiny_bert))
    both = views(tiny_bert, mask_views=MaskViews.BOTH)
    assert all("[MASK]" in first and "[MASK]" in second for first, second in both)
    assert sum(first != second for first, second in both) >= 6
    by_the_letter = views(tiny_bert, reference_masking=True)
    assert all("[MASK]" not in first and "[MASK]" in second for first, second in by_the_letter)
    with pytest.raises(InputError, match="leave --mask-views out"):
        dataclasses.replace(SMALL, reference_masking=True, mask_views=MaskViews.BOTH)
    plain = views(tiny_bert, mask_length=0)
    repeated = views(tiny_bert, mask_length=0, repetition=0.5)
    assert [first for first, _ in repeated] == [first for first, _ in plain]
    assert sum(len(second) > len(first) for first, second in repeated) >= 4
    assert views(tiny_bert, mask_length=0, repetition=0.5) == repeated
    same = views(tiny_bert, documents=True, views=SAME, mask_length=0, repetition=0.5)
    assert [first for first, _ in same] == [first for first, _ in plain]
    assert sum(len(second) > len(first) for first, second in same) >= 4
    titles = views(tiny_bert, documents=True, mask_length=0)
    assert views(tiny_bert, documents=True, mask_length=0, repetition=0.5) == titles


def test_the_learning_rate_rises_and_falls_as_scheduled() -> None:
    def rates(schedule: Schedule, warmup: float) -> list[float]:
        config = dataclasses.replace(SMALL, schedule=schedule, warmup=warmup)
        return [learning_rate(step, 8, config) for step in range(1, 9)]

    assert rates(Schedule.CONSTANT, 0.0) == [1.0] * 8
    assert rates(Schedule.CONSTANT, 0.5) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert rates(Schedule.LINEAR, 0.0) == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert rates(Schedule.LINEAR, 0.25) == pytest.approx([0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = rates(Schedule.COSINE, 0.0)
    assert cosine[4] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[-1] > 0


def test_clipping_bounds_the_gradient_and_drophead_changes_the_run(tiny_bert: Path) -> None:
    plain = weights(tuned(tiny_bert)[0])
    assert torch.equal(plain, weights(tuned(tiny_bert, dataclasses.replace(SMALL, clip=1e9))[0]))
    # AdamW undoes any factor that is the same in all steps, so the clip shows only where steps differ
    assert not torch.equal(plain, weights(tuned(tiny_bert, dataclasses.replace(SMALL, clip=1e-3))[0]))
    assert not torch.equal(plain, weights(tuned(tiny_bert, dataclasses.replace(SMALL, drophead=0.5))[0]))


def test_a_template_is_part_of_every_view(tiny_bert: Path) -> None:
    reference = load(tiny_bert)
    templated = dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, template="river: {text}"))
    bare, longer = (next(batches(one, TEXTS, SMALL, FP32)) for one in (reference, templated))
    assert longer.tokens == bare.tokens + 2 * SMALL.batch_size * 2  # "river" and ":" in both views
