"""Every family: in packed rows, each text has the vector and the gradient of Hugging Face's own forward pass."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from encoders.families import FAMILIES
from encoders.layers import hidden_states, relative_bucket
from encoders.reference import Reference, eager_attention
from encoders.source import resolve
from encoders.write import write_layout
from mirror_runtime.bundle import TOKENIZER_FILE, Pooling
from mirror_runtime.errors import BundleError
from mirror_runtime.tokenizer import LongTexts, Tokenizer
from tests.support.tiny_encoders import POSITIONS, ragged_texts
from training.dropout import WordDropout, set_dropout
from training.packed import PackedTexts, encode_packed, pack

Make = Callable[[str], Path]
TEXTS = ragged_texts()

each_family = pytest.mark.parametrize("family", list(FAMILIES))


@pytest.fixture(scope="module")
def load(tiny_encoder: Make) -> Callable[[str], Reference]:
    return cache(lambda family: Reference.load(resolve(str(tiny_encoder(family)), pooling=Pooling.MEAN)))


@pytest.fixture
def reference(load: Callable[[str], Reference], family: str) -> Reference:
    return load(family)


def rows(reference: Reference, texts: tuple[str, ...], pad_to: int | None = None) -> PackedTexts:
    ids = reference.tokenizer(list(texts), truncation=True, max_length=POSITIONS)["input_ids"]
    return pack(ids, length=64, pad_id=reference.tokenizer.pad_token_id, pad_to=pad_to)


def padded(reference: Reference, texts: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
    return reference.tokenizer(list(texts), truncation=True, max_length=POSITIONS, padding=True, return_tensors="pt")


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether vectors differ by far more than rounding."""
    return bool(np.abs(one - other).max() > 0.05)


@each_family
@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS, Pooling.MEAN_PADDED])
def test_packed_equals_hugging_face(reference: Reference, tiny_encoder: Make, family: str, pooling: Pooling) -> None:
    reference = dataclasses.replace(reference, spec=resolve(str(tiny_encoder(family)), pooling=pooling).spec)
    assert reference.spec.max_tokens == POSITIONS  # although RoBERTa's and MPNet's tables have two more rows
    packed = rows(reference, TEXTS, reference.spec.pad_to)
    with torch.inference_mode():
        vectors = encode_packed(reference.model, packed, pooling).numpy()
    expected = reference.encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert differ(expected[0], expected[1])
    assert pooling is Pooling.MEAN_PADDED or len(packed.input_ids) < len(TEXTS)


@each_family
def test_every_layer_and_its_attention_equal_hugging_face(reference: Reference) -> None:
    texts = TEXTS[:6]
    batch = padded(reference, texts)
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    own = batch["attention_mask"].bool()
    model: Any = reference.model
    with eager_attention(model), torch.inference_mode():
        whole = model(**batch, output_hidden_states=True, output_attentions=True)
        for mask in (own[:, None, None, :], torch.where(own[:, None, None, :], 0.0, -10_000.0)):
            states, weights = hidden_states(model, batch["input_ids"], positions, mask, attentions_of=1)
            assert len(states) == len(whole.hidden_states) == 3
            for ours, theirs in zip(states, whole.hidden_states, strict=True):
                torch.testing.assert_close(ours[own], theirs[own], atol=1e-5, rtol=0)
            assert weights is not None
            torch.testing.assert_close(weights, whole.attentions[1], atol=1e-5, rtol=0)
            (*_, first), _ = hidden_states(model, batch["input_ids"], positions, mask, pick=lambda rows: rows[:, :, :1])
            torch.testing.assert_close(first[:, 0], states[-1][:, 0], atol=1e-5, rtol=0)


@each_family
def test_gradients_equal_those_of_hugging_face(reference: Reference) -> None:
    texts = TEXTS[:8]
    vectors = encode_packed(reference.model, rows(reference, texts), Pooling.MEAN)
    batch = padded(reference, texts)
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = (reference.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    named = [(name, weight) for name, weight in reference.model.named_parameters() if "pooler" not in name]
    weights = [weight for _, weight in named]
    ours = torch.autograd.grad(vectors.cos().sum(), weights)
    theirs = torch.autograd.grad(expected.cos().sum(), weights)
    for (name, _), one, other in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, msg=name)
    touched = [name for (name, _), gradient in zip(named, theirs, strict=True) if gradient.abs().max() > 1e-3]
    assert len(touched) >= len(named) - 2  # the bias of a key moves no softmax, and there are two layers


@each_family
def test_neighbours_and_tokens_in_empty_slots_do_not_matter(reference: Reference) -> None:
    one, other = rows(reference, TEXTS[:4]), rows(reference, (TEXTS[0], *TEXTS[9:14]))
    other.input_ids[other.text_ids == 0] = 0  # as the runtime fills them
    with torch.inference_mode():
        vectors = [encode_packed(reference.model, packed, Pooling.MEAN)[0] for packed in (one, other)]
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-5, rtol=0)


@each_family
def test_every_dropout_is_replaced_and_used(reference: Reference) -> None:
    model, packed = reference.model, rows(reference, TEXTS[:4])
    places = sum(isinstance(module, nn.Dropout) for module in model.modules())
    expected = encode_packed(model, packed, Pooling.MEAN)
    with set_dropout(model, 0.5):
        fast = [module for module in model.modules() if isinstance(module, WordDropout)]
        assert len(fast) == places >= 5
        torch.testing.assert_close(encode_packed(model, packed, Pooling.MEAN), expected, atol=1e-5, rtol=0)
        for module in fast:  # each alone changes the vectors, so all are used
            module.train()
            torch.manual_seed(0)
            assert differ(encode_packed(model, packed, Pooling.MEAN).detach().numpy(), expected.detach().numpy())
            module.eval()


@each_family
def test_tokens_are_those_of_tokenizer_json_and_the_position_table_bounds_their_number(reference, tiny_encoder, family):
    path = tiny_encoder(family) / TOKENIZER_FILE
    runtime = Tokenizer(path, 200_000, LongTexts.ERROR)(TEXTS)
    assert not runtime.errors
    pieces = np.split(runtime.ids, np.cumsum(runtime.lengths)[:-1])
    assert [pieces[i].tolist() for i in runtime.part_piece] == reference.tokenizer(list(TEXTS))["input_ids"]
    folder = str(tiny_encoder(family))
    with pytest.raises(BundleError, match="has 64 positions, fewer than the 65 tokens"):
        resolve(folder, pooling=Pooling.MEAN, max_tokens=POSITIONS + 1)


@each_family
def test_a_run_folder_loads_again_and_in_sentence_transformers(reference: Reference, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    write_layout(tmp_path, model=reference.model, tokenizer=reference.tokenizer, spec=reference.spec, card="")
    again = Reference.load(resolve(str(tmp_path)))
    np.testing.assert_array_equal(again.encode(TEXTS), expected := reference.encode(TEXTS))
    peer = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(peer.encode(list(TEXTS)), expected, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == reference.spec.family


def test_distances_have_the_buckets_of_mpnet() -> None:
    distances = torch.arange(-600, 601)
    ours = [relative_bucket(distance) for distance in distances.tolist()]
    assert ours == MPNetEncoder.relative_position_bucket(distances).tolist()
