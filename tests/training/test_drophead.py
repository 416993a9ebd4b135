"""DropHead in packed rows is DropHead on each text alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import InputError
from tests.support.tuning import load
from training.drophead import drop_heads, head_scales
from training.packed import encode_packed, pack

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


def test_nothing_is_left_on_the_model_and_an_unknown_family_is_refused(tiny_bert: Path) -> None:
    model: Any = load(tiny_bert).model
    with drop_heads(model, 0.0) as drophead:
        assert drophead is None
    with drop_heads(model, 0.5):
        assert any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    modules = model.encoder.layer[0].attention.output._modules
    modules["renamed"] = modules.pop("dense")
    with pytest.raises(InputError, match="--drophead is not supported for a bert model"), drop_heads(model, 0.5):
        pass
