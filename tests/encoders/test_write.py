"""The folder that is written, and who can read it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders.pooling import make_dense
from encoders.reference import Reference
from encoders.source import HeadSpec, resolve
from encoders.write import write_layout
from mirror_runtime.bundle import Activation, Dense, Ditto, Pooling, VectorType, read_encoder
from mirror_runtime.prompts import PROMPTS_FILE, read_prompts
from mirror_runtime.vectors import cosines

RAGGED = ["a", "", "the cat sat on the mat", "?!", "a man " * 40, "Dogs, playing the guitar by a RIVER", "  \t "]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def written(base: Path, folder: Path, pooling: Pooling | None, **options: Any) -> Reference:
    reference = Reference.load(resolve(str(base), pooling=pooling, **options))
    write_layout(folder, model=reference.model, tokenizer=reference.tokenizer, spec=reference.spec, card="# A card")
    return reference


def peer(folder: Path) -> Any:
    """Load a folder in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS, Pooling.MAX, Pooling.WEIGHTED_MEAN, Pooling.LAST])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_gives_the_reference_vectors(tiny_bert, tmp_path, pooling, normalize):
    reference = written(tiny_bert, tmp_path / "run", pooling, max_tokens=30, normalize=normalize)
    model = peer(tmp_path / "run")
    vectors = reference.encode(RAGGED)
    np.testing.assert_allclose(model.encode(RAGGED), vectors, atol=1e-5)
    np.testing.assert_allclose(model.encode(RAGGED[3]), vectors[3], atol=1e-5)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) == normalize
    # Without encoder.json the folder records the same.
    (tmp_path / "run" / "encoder.json").unlink()
    assert resolve(str(tmp_path / "run")).spec.pooling is pooling


def test_prompts_are_kept_unless_the_pooling_leaves_them_out(tiny_bert, tmp_path):
    reference = written(tiny_bert, tmp_path / "run", Pooling.MEAN)
    config, pooling = (tmp_path / "run" / name for name in (PROMPTS_FILE, "1_Pooling/config.json"))
    (tmp_path / "run" / "encoder.json").unlink()
    config.write_text(json.dumps({**read(config), "prompts": {"query": "find: "}}))
    kept = resolve(str(tmp_path / "run")).prompts
    options: dict[str, Any] = {
        "model": reference.model,
        "tokenizer": reference.tokenizer,
        "spec": reference.spec,
        "card": "",
    }
    write_layout(tmp_path / "again", prompts=kept, **options)
    assert read_prompts(tmp_path / "again") == kept == {"query": "find: "}
    found = peer(tmp_path / "again").encode(["a cat"], prompt_name="query")
    np.testing.assert_allclose(found, reference.encode(["find: a cat"]), atol=1e-5)
    options["spec"] = dataclasses.replace(reference.spec, pooling=Pooling.MEAN_PADDED, pad_to=reference.spec.max_tokens)
    write_layout(tmp_path / "beyond", prompts=kept, **options)
    assert read_prompts(tmp_path / "beyond") == kept, "also where sentence-transformers has no such pooling"
    pooling.write_text(json.dumps({**read(pooling), "include_prompt": False}))
    assert resolve(str(tmp_path / "run")).prompts == {}


def write_with_dense(base: Path, run: Path, **changes: Any) -> Reference:
    """Write the encoder with two dense layers of random weights after its mean."""
    dense = (
        Dense(in_features=32, out_features=24, bias=True, activation=Activation.TANH),
        Dense(in_features=24, out_features=16, bias=False, activation=Activation.GELU),
    )
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(one.out_features, one.in_features, generator=draw) for one in dense]
    bias = torch.randn(dense[0].out_features, generator=draw)
    layers = tuple(make_dense(*one) for one in zip(dense, weights, (bias, None), strict=True))
    plain = Reference.load(resolve(str(base), pooling=Pooling.MEAN, max_tokens=30))
    spec = dataclasses.replace(plain.spec, dense=dense, template="the cat: {text}", **({"dim": 16} | changes))
    reference = dataclasses.replace(plain, spec=spec, dense=layers)
    write_layout(run, model=plain.model, tokenizer=plain.tokenizer, spec=spec, dense=layers, card="")
    return reference


@pytest.mark.parametrize("changes", [{}, {"normalize": True}, {"dim": 8}, {"dim": 8, "normalize": True}])
def test_dense_layers_a_cut_and_a_prompt_survive_in_sentence_transformers(tiny_bert, tmp_path, changes):
    run = tmp_path / "run"
    reference = write_with_dense(tiny_bert, run, **changes)
    if "dim" not in changes:  # sentence-transformers writes what it has read
        peer(run).save(str(tmp_path / "theirs"))
        theirs = Reference.load(resolve(str(tmp_path / "theirs"), max_tokens=30))
        np.testing.assert_allclose(theirs.encode(RAGGED), reference.encode(RAGGED), atol=1e-5)
    vectors = reference.encode(RAGGED)
    assert vectors.shape == (len(RAGGED), reference.spec.dim)
    np.testing.assert_allclose(peer(run).encode(RAGGED), vectors, atol=1e-5)
    again = Reference.load(resolve(str(run)))
    assert again.spec == reference.spec
    assert np.array_equal(again.encode(RAGGED), vectors)
    # Without encoder.json we read the same files as sentence-transformers: the cut is a dense layer then.
    (run / "encoder.json").unlink()
    theirs = Reference.load(resolve(str(run)))
    assert len(theirs.dense) == 2 + ("dim" in changes)
    assert theirs.spec.template == "the cat: {text}"
    np.testing.assert_allclose(theirs.encode(RAGGED), vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "changes", "reason"),
    [
        (HeadSpec(pooling=Pooling.MASK, template="{text} is [MASK]"), {}, "pooling `mask`"),
        (HeadSpec(pooling=Pooling.MEAN_PADDED), {}, "padded to 30 tokens"),
        (HeadSpec(ditto=Ditto(layer=0, head=1)), {}, "pooling `ditto`"),
        (HeadSpec(pooling=Pooling.MEAN, layers=(0, -1)), {}, "average of layers 0, -1"),
        (HeadSpec(pooling=Pooling.MEAN, template="a {text} ."), {}, "continues after the text"),
        (HeadSpec(pooling=Pooling.MEAN), {"vector_type": VectorType.BINARY}, "binary vectors"),
        (HeadSpec(pooling=Pooling.MEAN), {"vector_type": VectorType.INT8, "int8_scale": 0.1}, "int8 vectors"),
    ],
)
def test_heads_beyond_sentence_transformers_get_no_modules(tiny_bert, tmp_path, head, changes, reason):
    run = tmp_path / "run"
    source = resolve(str(tiny_bert), head=head, max_tokens=30)
    reference = Reference.load(dataclasses.replace(source, spec=dataclasses.replace(source.spec, **changes)))
    write_layout(run, model=reference.model, tokenizer=reference.tokenizer, spec=reference.spec, card="")
    assert not (run / "modules.json").exists()
    assert not (run / "1_Pooling").exists()
    card = (run / "README.md").read_text(encoding="utf-8")
    assert reason in card
    assert "sentence-transformers\n" not in card.split("---")[1]
    again = Reference.load(resolve(str(run)))
    assert again.spec == reference.spec
    assert np.array_equal(again.encode(RAGGED), reference.encode(RAGGED))


@pytest.mark.parity
def test_real_weights_on_ragged_real_text_survive_the_round_trip(minilm: Path, tmp_path: Path) -> None:
    names = ("json", "pathlib", "argparse", "os", "logging", "random")
    docs = [value.__doc__ for name in names for value in vars(__import__(name)).values() if callable(value)]
    texts = [line for doc in docs if doc for line in (doc.strip(), doc.strip().split("\n")[0])][:60]
    assert min(map(len, texts)) < 40
    assert max(map(len, texts)) > 1000
    reference = written(minilm, tmp_path / "run", None)
    vectors = reference.encode(texts)
    theirs = peer(tmp_path / "run").encode(texts)
    assert cosines(vectors, theirs).min() >= 0.99999
    again = Reference.load(resolve(str(tmp_path / "run")))
    assert again.spec == reference.spec
    assert np.array_equal(again.encode(texts[:8]), reference.encode(texts[:8]))
    alone = np.concatenate([reference.encode([text]) for text in texts[:16]])
    assert cosines(vectors[:16], alone).min() >= 0.99999


def test_the_folder_holds_what_other_tools_read(tiny_bert: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reference = written(tiny_bert, run, Pooling.CLS, max_tokens=30, normalize=True)
    reference.encode(RAGGED)
    assert read_encoder(run) == reference.spec
    assert [module["type"] for module in read(run / "modules.json")] == [
        f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")
    ]
    pooling = read(run / "1_Pooling" / "config.json")
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_cls_token", "include_prompt"]
    assert read(run / "sentence_bert_config.json") == {"max_seq_length": 30, "do_lower_case": False}
    config = read(run / "config.json")
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertModel"])
    assert config["max_position_embeddings"] == 64
    assert read(run / "special_tokens_map.json")["mask_token"] == "[MASK]"
    vocabulary = (run / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert {token: i for i, token in enumerate(vocabulary)} == reference.tokenizer.get_vocab()
    card = (run / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n")
    assert "- text-embeddings-inference\n---\n\n# A card\n" in card
    assert (run / "model.safetensors").stat().st_mode == (run / "config.json").stat().st_mode
    assert str(tmp_path) not in "".join(path.read_text("utf-8") for path in run.rglob("*.json"))


def test_truncation_and_padding_state_does_not_leak_into_the_tokenizer(tiny_bert: Path, tmp_path: Path) -> None:
    reference = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN, max_tokens=30))
    reference.encode(["a man " * 40])  # leaves truncation at 30 in the tokenizer
    assert reference.tokenizer.backend_tokenizer.truncation is not None
    write_layout(tmp_path, model=reference.model, tokenizer=reference.tokenizer, spec=reference.spec, card="")
    state = read(tmp_path / "tokenizer.json")
    assert (state["truncation"], state["padding"]) == (None, None)
    config = read(tmp_path / "tokenizer_config.json")
    assert (config["model_max_length"], config["pad_token"]) == (30, "[PAD]")
    assert not config.keys() & {"max_length", "truncation_strategy", "stride", "name_or_path"}
