"""The fast dropout is dropout, and DropHead in packed rows is DropHead on each text alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from encoders.layers import hidden_states
from mirror_runtime.bundle import Pooling
from tests.support.tuning import load
from training.drophead import drop_heads, head_scales
from training.dropout import WordDropout, attention, set_dropout, word_dropout
from training.packed import encode_packed, pack


def hidden(model: Any, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return hidden_states(model, ids, positions, allowed, attention=attention)[0][-1]


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_and_scale_are_right(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = word_dropout(torch.ones(1001, 1000, dtype=dtype), p)
    assert values.dtype is dtype
    rate = (values == 0).double().mean().item()
    assert rate == pytest.approx(p, abs=5 * (p * (1 - p) / values.numel()) ** 0.5)
    precision = 1e-4 if dtype is torch.float32 else 1e-2
    assert values[values != 0].unique().tolist() == [pytest.approx(1 / (1 - p), rel=precision)]


def test_elements_are_independent_of_each_other_of_their_place_and_of_earlier_draws() -> None:
    """Four elements come from one random word: neither their rates nor their pairs may show it."""
    torch.manual_seed(1)
    dropped = (word_dropout(torch.ones(400_000, 4), 0.3) == 0).double()
    assert dropped.mean(dim=0).tolist() == pytest.approx([0.3] * 4, abs=0.004)
    covariance = torch.cov(dropped.T)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.002
    assert torch.cov(torch.stack([dropped[1:].flatten(), dropped[:-1].flatten()]))[0, 1].abs() < 0.002
    values = torch.randn(37, 5)
    torch.manual_seed(3)
    first, second = word_dropout(values, 0.5), word_dropout(values, 0.5)
    torch.manual_seed(3)
    assert torch.equal(word_dropout(values, 0.5), first)
    assert not torch.equal(first, second)


def test_gradient_follows_the_mask_and_nothing_is_dropped_at_zero_or_in_evaluation() -> None:
    values = torch.ones(1000, requires_grad=True)
    assert torch.equal(word_dropout(values, 0.0), values)
    assert torch.equal(WordDropout(0.9).eval()(values), values)
    dropped = word_dropout(values, 0.5)
    dropped.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, dropped.detach())


def test_a_model_gets_the_rate_everywhere_and_its_own_modules_back(tiny_bert: Path) -> None:
    model = load(tiny_bert).model
    before = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    with set_dropout(model, 0.37):
        fast = [module.p for module in model.modules() if isinstance(module, WordDropout)]
        assert fast == [0.37] * len(before)
        assert not [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [module for module in model.modules() if isinstance(module, nn.Dropout)] == before


def test_attention_is_that_of_pytorch_but_for_the_mask(tiny_bert: Path) -> None:
    model = load(tiny_bert).model
    ids = torch.randint(5, 40, (3, 16), generator=torch.Generator().manual_seed(0))
    allowed = (torch.arange(16) // 5)[:, None] == (torch.arange(16) // 5)[None, :]
    allowed = allowed.expand(3, 1, 16, 16)
    expected = hidden(model, ids, allowed)
    with set_dropout(model, 0.5):
        torch.testing.assert_close(hidden(model, ids, allowed), expected, atol=1e-5, rtol=1e-5)
        model.train()
        torch.manual_seed(0)
        noisy = hidden(model, ids, allowed)
    assert (noisy - expected).abs().max() > 0.1


def test_attention_probabilities_are_dropped_too(tiny_bert: Path) -> None:
    model = load(tiny_bert).model
    ids, allowed = torch.full((1, 16), 7), torch.ones(1, 1, 16, 16, dtype=torch.bool)
    with set_dropout(model, 0.5):
        for module in model.modules():
            if isinstance(module, WordDropout):
                module.eval()  # only the dropout of attention stays active
        model.get_submodule("encoder.layer.0.attention.self.dropout").training = True
        torch.manual_seed(0)
        first, second = (hidden(model, ids, allowed) for _ in range(2))
    assert not torch.equal(first, second)


TEXTS = ["the cat", "a man is playing a guitar by the river", "dogs", "the dog sat on a mat, and on a cat"]


def test_heads_are_dropped_at_the_rate_and_the_others_scaled_up_but_never_all_of_a_text() -> None:
    torch.manual_seed(0)
    scales = head_scales(20_000, 12, 0.2)
    assert (scales == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    torch.testing.assert_close(scales.sum(dim=1), torch.full((20_000,), 12.0))
    assert all(len(set(row[row > 0].tolist())) == 1 for row in scales[:100])
    scales = head_scales(1000, 2, 0.9)
    assert bool((scales == 1).all(dim=1).any())
    assert bool((scales.sum(dim=1) == 2).all())


def test_packed_rows_equal_padded_texts_with_the_definition(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition: what head h of layer l gives for text t is multiplied by scale[l][t, h]."""
    reference = load(tiny_bert)
    model: Any = reference.model
    drawn: list[torch.Tensor] = []

    def record(*arguments: Any) -> torch.Tensor:
        drawn.append(head_scales(*arguments))
        return drawn[-1]

    monkeypatch.setattr("training.drophead.head_scales", record)
    packed = pack(reference.tokenizer(TEXTS)["input_ids"], length=32, pad_id=0)
    assert len(packed.input_ids) < len(TEXTS)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    torch.manual_seed(1)
    with torch.no_grad(), drop_heads(model, 0.5) as drophead:
        assert drophead is not None
        drophead.text_ids = packed.text_ids
        vectors = encode_packed(model, packed, Pooling.MEAN)
        plain = encode_packed(model.eval(), packed, Pooling.MEAN)
    assert len(drawn) == 2  # one draw a layer, and none in evaluation mode
    batch = reference.tokenizer(TEXTS, padding=True, return_tensors="pt")
    for layer, scales in zip(model.encoder.layer, drawn, strict=True):
        by_component = scales[1:].repeat_interleave(16, dim=1)[:, None, :]  # two heads of 16
        layer.attention.output.dense.register_forward_pre_hook(lambda _, inputs, by=by_component: (inputs[0] * by,))
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    torch.testing.assert_close(vectors, (hidden * mask).sum(1) / mask.sum(1), atol=1e-5, rtol=0)
    assert (vectors - plain).abs().max() > 0.05


def test_nothing_is_left_on_the_model(tiny_bert: Path) -> None:
    model: Any = load(tiny_bert).model
    with drop_heads(model, 0.0) as drophead:
        assert drophead is None
    with drop_heads(model, 0.5):
        assert any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
