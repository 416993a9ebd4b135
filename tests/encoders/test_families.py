"""Every family: in packed rows, each text has the vector and the gradient of Hugging Face's own forward pass."""

import dataclasses
import gc
import importlib
import json
import operator
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import GteConfig, GteModel
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
from transformers.models.t5.modeling_t5 import T5Attention

from encoders import families
from encoders.families import FAMILIES
from encoders.layers import disentangled_bucket, hidden_states, layer_names, layers_of, relative_bucket
from encoders.reference import Reference, eager_attention
from encoders.source import resolve
from encoders.write import write_layout
from export.graph.trace import Positions
from mirror_runtime.bundle import TOKENIZER_FILE, Pooling
from mirror_runtime.errors import BundleError
from mirror_runtime.tokenizer import LongTexts, Tokenizer
from mirror_runtime.vectors import cosines
from tests.support.paths import ROOT
from tests.support.tiny_encoders import MODELS, POSITIONS, ragged_texts
from training.dropout import WordDropout, set_dropout
from training.packed import PackedTexts, encode_packed, pack

Make = Callable[[str], Path]
TEXTS = ragged_texts()

HIDDEN_FROM_PADDING = ("modernbert", "qwen3", "gemma3_text", "deberta-v2")

each_family = pytest.mark.parametrize("family", list(MODELS))


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
    return bool(np.abs(one - other).max() > 0.01)


@each_family
@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS, Pooling.LAST, Pooling.MEAN_PADDED])
def test_packed_equals_hugging_face(reference: Reference, tiny_encoder: Make, family: str, pooling: Pooling) -> None:
    spec = resolve(str(tiny_encoder(family)), pooling=pooling).spec
    if pooling is Pooling.MEAN_PADDED and family in HIDDEN_FROM_PADDING:
        with pytest.raises(BundleError, match="padding that does not see its text"):
            dataclasses.replace(reference, spec=spec)
        return
    reference = dataclasses.replace(reference, spec=spec)
    assert reference.spec.max_tokens == POSITIONS  # although RoBERTa's and MPNet's tables have two more rows
    packed = rows(reference, TEXTS, reference.spec.pad_to)
    with torch.inference_mode():
        vectors = encode_packed(reference.model, packed, pooling).numpy()
    expected = reference.encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert (cosines(vectors, expected) >= 0.99999).all()
    # The first token of a causal encoder sees no other.
    assert differ(expected[0], expected[1]) or (family, pooling) == ("qwen3", Pooling.CLS)
    assert pooling is Pooling.MEAN_PADDED or len(packed.input_ids) < len(TEXTS)


@pytest.mark.parametrize("family", [name for name in MODELS if FAMILIES[name].windowed])
def test_texts_longer_than_a_window_see_what_hugging_face_lets_them_see(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("cat " * 60, "dog " * 40 + "cat", "cat", "a dog")
    packed = rows(reference, texts)
    assert len(packed.input_ids) < len(texts)
    exact = encode_packed(reference.model, packed, Pooling.MEAN).detach().numpy()
    np.testing.assert_allclose(exact, reference.encode(texts), atol=1e-5)
    for module in reference.model.modules():
        if getattr(module, "sliding_window", None):
            monkeypatch.setattr(module, "sliding_window", None)
    unbounded = encode_packed(reference.model, packed, Pooling.MEAN).detach().numpy()
    assert differ(exact[0], unbounded[0])
    assert differ(exact[1], unbounded[1])
    np.testing.assert_allclose(exact[2:], unbounded[2:], atol=1e-5)


@each_family
def test_every_layer_and_its_attention_equal_hugging_face(reference: Reference) -> None:
    texts = TEXTS[:6]
    batch = padded(reference, texts)
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    own = batch["attention_mask"].bool()
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model: Any = reference.model
    with eager_attention(model), torch.inference_mode():
        whole = model(**batch, output_hidden_states=True, output_attentions=True)
        for mask in (own[:, None, None, :], torch.where(own[:, None, None, :], 0.0, -10_000.0)):
            states, weights = hidden_states(model, batch["input_ids"], positions, mask, attentions_of=1)
            assert len(states) == len(whole.hidden_states) == len(layers_of(model)) + 1
            for ours, theirs in zip(states, whole.hidden_states, strict=True):
                torch.testing.assert_close(ours[own], theirs[own], atol=1e-5, rtol=0)
            assert weights is not None
            of_texts = [values.transpose(1, 2)[own] for values in (weights, whole.attentions[1])]
            torch.testing.assert_close(*of_texts, atol=1e-5, rtol=0)
            (*_, first), _ = hidden_states(model, batch["input_ids"], positions, mask, pick=lambda rows: rows[:, :, :1])
            torch.testing.assert_close(first[:, 0], states[-1][:, 0], atol=1e-5, rtol=0)


@each_family
def test_gradients_equal_those_of_hugging_face(reference: Reference) -> None:
    texts = TEXTS[:8]
    vectors = encode_packed(reference.model, rows(reference, texts), Pooling.MEAN)
    batch = padded(reference, texts)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = reference.model(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
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
def test_every_dropout_is_replaced_and_used(reference: Reference, family: str) -> None:
    model, packed = reference.model, rows(reference, TEXTS[:4])
    places = sum(isinstance(module, nn.Dropout) for module in model.modules())
    name = operator.attrgetter(layer_names(model).attention_dropout)
    places += sum(isinstance(name(layer), float) for layer in layers_of(model))
    expected = encode_packed(model, packed, Pooling.MEAN)
    with set_dropout(model, 0.5):
        fast = [module for module in model.modules() if isinstance(module, WordDropout)]
        assert len(fast) == places >= 2
        torch.testing.assert_close(encode_packed(model, packed, Pooling.MEAN), expected, atol=1e-5, rtol=0)
        unused = 0
        for module in fast:  # each alone changes the vectors, so all are used
            module.train()
            torch.manual_seed(0)
            unused += not differ(encode_packed(model, packed, Pooling.MEAN).detach().numpy(), expected.detach().numpy())
            module.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # as runs on CPUs with bf16
            rounded = encode_packed(model.train(), packed, Pooling.MEAN)
        model.eval()
        assert differ(rounded.detach().numpy(), expected.detach().numpy())
        assert unused == (2 if family == "albert" else 0)  # transformers does not use one in each of its layers either
    torch.testing.assert_close(encode_packed(model, packed, Pooling.MEAN), expected, atol=1e-5, rtol=0)
    assert isinstance(reference.encode(TEXTS[:1]), np.ndarray)  # what was replaced is back


@each_family
def test_tokens_are_those_of_tokenizer_json_and_the_position_table_bounds_their_number(reference, tiny_encoder, family):
    path = tiny_encoder(family) / TOKENIZER_FILE
    runtime = Tokenizer(path, 200_000, LongTexts.ERROR)(TEXTS)
    assert not runtime.errors
    pieces = np.split(runtime.ids, np.cumsum(runtime.lengths)[:-1])
    assert [pieces[i].tolist() for i in runtime.part_piece] == reference.tokenizer(list(TEXTS))["input_ids"]
    folder = str(tiny_encoder(family))
    if FAMILIES[family].longest is None:
        assert resolve(folder, pooling=Pooling.MEAN, max_tokens=POSITIONS + 1).spec.max_tokens == POSITIONS + 1
        return
    with pytest.raises(BundleError, match="has 64 positions, fewer than the 65 tokens"):
        resolve(folder, pooling=Pooling.MEAN, max_tokens=POSITIONS + 1)


@each_family
def test_a_run_folder_loads_again_and_in_sentence_transformers(
    reference: Reference, family: str, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    write_layout(tmp_path, model=reference.model, tokenizer=reference.tokenizer, spec=reference.spec, card="")
    again = Reference.load(resolve(str(tmp_path)))
    np.testing.assert_array_equal(again.encode(TEXTS), expected := reference.encode(TEXTS))
    if family in ("ernie", "nomic_bert", "gte", "eurobert", "jina_embeddings_v3", "deberta-v2"):
        return  # each is like another one to sentence-transformers, which takes a second to load
    peer = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(peer.encode(list(TEXTS)), expected, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == reference.spec.family


@pytest.mark.parametrize(
    ("family", "pooling", "dense", "normalize", "prompts"),
    [
        ("qwen3", "lasttoken", 0, False, {"prompts": {"query": "Instruct: search\nQuery:", "document": ""}}),
        ("gemma3_text", "mean", 2, True, {"prompts": {"query": "query: "}, "default_prompt_name": "query"}),
        ("t5", "mean", 1, True, {}),
        ("modernbert", "cls", 0, False, {"prompts": {"query": "", "document": ""}}),
    ],
)
def test_folders_that_sentence_transformers_writes_are_read_as_it_means_them(
    tiny_encoder: Make, family: str, pooling: str, dense: int, normalize: bool, prompts: Any, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    models: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    transformer = models.Transformer(str(tiny_encoder(family)), max_seq_length=40)
    transformer.tokenizer.padding_side = "left" if family == "qwen3" else "right"
    modules = [transformer, models.Pooling(32, pooling_mode=pooling)]
    modules += [models.Dense(32, 32, bias=False, activation_function=nn.Identity()) for _ in range(dense)]
    modules += [models.Normalize()] * normalize
    peer = SentenceTransformer(modules=modules, device="cpu", **prompts)
    peer.save_pretrained(str(tmp_path))
    found = Reference.load(resolve(str(tmp_path)))
    assert (found.spec.max_tokens, found.spec.normalize, len(found.spec.dense)) == (40, normalize, dense)
    np.testing.assert_allclose(found.encode(TEXTS), peer.encode(list(TEXTS)), atol=1e-5)


@pytest.mark.parametrize("family", ["modernbert", "deberta-v2"])
def test_tables_of_positions_replace_what_layers_compute_of_them(reference: Reference, family: str) -> None:
    model, packed = reference.model, rows(reference, TEXTS[:6])
    inputs = packed.input_ids, packed.position_ids, packed.attention_mask()
    names, reads = layer_names(model), []
    keys = [layer.get_submodule(names.qkv or names.key) for layer in layers_of(model)]
    hooks = [key.register_forward_hook(lambda _, given, __: reads.append(given[0].shape[-2])) for key in keys]
    with torch.inference_mode():
        tables = Positions(reference)()
        reads.clear()
        states, _ = hidden_states(model, *inputs, tables=tables)
        assert reads == [packed.input_ids.shape[1]] * len(keys)  # the text alone: int8 has scales for nothing else
        torch.testing.assert_close(states[-1], hidden_states(model, *inputs)[0][-1], atol=1e-5, rtol=0)
    for hook in hooks:
        hook.remove()


def test_an_entry_adds_a_family_and_no_code(
    tiny_encoder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that transformers learns tomorrow, here a renamed copy of GTE: the documented entry is all it needs."""
    config: Any = type("CopiedConfig", (GteConfig,), {"model_type": "copied"})
    model: Any = type("CopiedModel", (GteModel,), {"config_class": config})
    transformers.AutoConfig.register("copied", config)
    transformers.AutoModel.register(config, model)
    folder = shutil.copytree(tiny_encoder("gte"), tmp_path / "copied")
    model(config.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(BundleError, match=r"'copied': .* It has rotary positions; the nearest family is nomic_bert"):
        resolve(str(folder), pooling=Pooling.MEAN)
    (known,) = gc.get_referents(FAMILIES)  # what the read-only mapping shows
    page = (ROOT / "docs" / "reference" / "families.md").read_text()
    entry = "".join(re.findall(r"^\+( +(?:\"gte\"|layer=|layers=|positions=|rotary=|\),).*\n)", page, re.MULTILINE))
    monkeypatch.setitem(known, "copied", eval(f"{{{entry}}}", vars(families))["gte"])
    reference = Reference.load(resolve(str(folder), pooling=Pooling.MEAN))
    assert isinstance(reference.model, model)
    vectors = encode_packed(reference.model, rows(reference, TEXTS), Pooling.MEAN).detach().numpy()
    np.testing.assert_allclose(vectors, reference.encode(TEXTS), atol=1e-5)


def test_every_family_with_layers_is_tested() -> None:
    assert set(MODELS) == {name for name, family in FAMILIES.items() if not family.is_static}


def test_distances_have_the_buckets_of_transformers() -> None:
    distances = torch.arange(-600, 601)
    ours = [relative_bucket(distance) for distance in distances.tolist()]
    assert ours == MPNetEncoder.relative_position_bucket(distances).tolist()
    assert ours == T5Attention._relative_position_bucket(distances).tolist()
    for size, furthest in ((256, 512), (8, 64), (32, 128)):
        ours = [disentangled_bucket(distance, size, furthest) for distance in distances.tolist()]
        assert ours == make_log_bucket_position(distances, size, furthest).tolist()


def test_padding_on_the_left_changes_no_vector(load: Callable[[str], Reference]) -> None:
    reference = load("qwen3")
    packed = encode_packed(reference.model, rows(reference, TEXTS[:8]), Pooling.LAST)
    batch = reference.tokenizer(
        list(TEXTS[:8]), truncation=True, max_length=POSITIONS, padding=True, padding_side="left", return_tensors="pt"
    )
    states = reference.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(packed, states[:, -1], atol=1e-5, rtol=0)
