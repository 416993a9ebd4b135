"""Static encoders: the vectors of their owners' libraries, also of texts without tokens, from reference and bundle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from encoders.reference import Reference
from encoders.source import HeadSpec, resolve
from export.bundle.build import Request, build
from export.to_onnx import main
from mirror_runtime import Encoder
from mirror_runtime.bundle import Pooling, Precision
from mirror_runtime.errors import BundleError
from tests.support.tiny_encoders import POSITIONS, ragged_texts, write_tiny_static

NO_TOKENS = ("", " \t\n", "\u00ad")
"""They have no token at all: the last is a soft hyphen, which the normalizer removes."""

UNKNOWN = ("漢漢 語", "語 the house")
"""The first has unknown tokens only."""

TEXTS = (*NO_TOKENS, *UNKNOWN, "the house is warm", *ragged_texts())


def of_sentence_transformers(folder: Path) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return np.asarray(SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS)), np.float32)


def of_model2vec(folder: Path, tokenizer: Tokenizer) -> np.ndarray:
    """model2vec's definition (0.10, `StaticModel._encode_batch`) without its cut after some characters."""
    stored: Mapping[str, Any] = {name: array.numpy() for name, array in load_file(folder / "model.safetensors").items()}
    tokenizer.enable_truncation(POSITIONS)
    unknown = tokenizer.token_to_id("[UNK]")
    vectors = np.zeros((len(TEXTS), 32), np.float32)
    for i, encoding in enumerate(tokenizer.encode_batch(list(TEXTS), add_special_tokens=False)):
        if ids := [token for token in encoding.ids if token != unknown]:
            found = stored["embeddings"][stored["mapping"][ids] if "mapping" in stored else ids].astype(np.float32)
            vectors[i] = (found * stored["weights"][ids][:, None] if "weights" in stored else found).mean(axis=0)
    return vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-32)


def add_head(folder: Path) -> None:
    """Add what a sentence-transformers folder may have after the table: a dense layer with a bias, unit length."""
    (folder / "1_Dense").mkdir()
    weights = {"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)}
    save_file(weights, folder / "1_Dense" / "model.safetensors")
    config = {"in_features": 32, "out_features": 16, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(config))
    kinds = ("StaticEmbedding", "Dense", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else ".", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def mapped() -> dict[str, torch.Tensor]:
    size = 300
    return {"weights": torch.rand(size, dtype=torch.float64) + 0.1, "mapping": torch.randint(0, size, (size,))}


@pytest.mark.parametrize(
    ("family", "head", "options"),
    [
        ("static", False, {}),
        ("static", True, {"dtype": torch.float16}),
        ("model2vec", False, {}),
        ("model2vec", False, {"dtype": torch.int8}),
        ("model2vec", False, mapped()),
    ],
    ids=["table", "dense-fp16", "model2vec", "int8-table", "weights-and-mapping"],
)
def test_vectors_are_those_of_the_owners_library(family: str, head: bool, options: Any, tmp_path: Path) -> None:
    tokenizer = write_tiny_static(family, tmp_path / "static", **options)
    if head:
        add_head(tmp_path / "static")
    source = resolve(str(tmp_path / "static"))
    assert (source.spec.family, source.spec.max_tokens, source.spec.normalize) == (
        family,
        64,
        family != "static" or head,
    )
    assert source.published == tmp_path / "static"
    expected = of_sentence_transformers(source.folder) if family == "static" else of_model2vec(source.folder, tokenizer)
    found = Reference.load(source).encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=2e-5 if options.get("dtype") is not torch.float16 else 2e-3)
    assert found[:3].any() == head  # a dense layer makes its bias of nothing
    assert found[3].any() == (family == "static")


@pytest.mark.trace
@pytest.mark.usefixtures("traces_from_cache")
@pytest.mark.parametrize("family", ["static", "model2vec"])
def test_a_bundle_has_the_vectors_of_its_encoder(family: str, tmp_path: Path) -> None:
    write_tiny_static(family, tmp_path / "encoder")
    if family == "static":
        add_head(tmp_path / "encoder")
    bundle = tmp_path / "bundle"
    exported = build(Request(encoder=str(tmp_path / "encoder"), output=bundle, texts=TEXTS))
    assert not exported.refused
    assert {artifact.precision for artifact in exported.manifest.artifacts} == {Precision.FP32}
    assert all(artifact.parity.min_cosine >= 0.999999 for artifact in exported.manifest.artifacts)
    expected = Reference.load(resolve(str(tmp_path / "encoder"))).encode(TEXTS)
    np.testing.assert_array_equal(Reference.load(resolve(str(bundle))).encode(TEXTS), expected)
    for engine in ("onnxruntime", "openvino"):
        with Encoder.load(bundle, engine=engine, precision="fp32") as encoder:
            found = encoder.encode_detailed(TEXTS)
            alone = [encoder.encode([text])[0] for text in TEXTS[:6]]
        np.testing.assert_allclose(found.vectors, expected, atol=1e-6)
        np.testing.assert_allclose(alone, expected[:6], atol=1e-6)
        assert (not found.errors, found.tokens[:3].tolist()) == (True, [0, 0, 0])
    assert (bundle / "modules.json").is_file() == (family == "static")  # model2vec's mean is nobody else's
    if family == "static":
        np.testing.assert_allclose(of_sentence_transformers(bundle)[:6], expected[:6], atol=1e-6)


@pytest.mark.parametrize("family", ["static", "model2vec"])
def test_a_limit_that_only_the_tokenizers_settings_state_is_not_the_encoders(family: str, tmp_path: Path) -> None:
    write_tiny_static(family, tmp_path / "encoder", limit=None)
    (tmp_path / "encoder" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10}))
    assert resolve(str(tmp_path / "encoder")).spec.max_tokens == 512


@pytest.mark.trace
@pytest.mark.usefixtures("traces_from_cache")
def test_other_precisions_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_static("model2vec", tmp_path / "encoder")  # whose graphs another test traces too
    (texts := tmp_path / "texts.txt").write_text("the house\n")
    command = [str(tmp_path / "encoder"), "--output", str(tmp_path / "bundle"), "--parity-texts", str(texts)]
    assert main([*command, "--precision", "fp32", "int8", "fp16"]) == 1
    refused = json.loads(capsys.readouterr().out.splitlines()[-1])["refused"]
    assert [one["artifact"] for one in refused] == ["fp16", "int8"]
    assert all("static encoder" in one["reason"] for one in refused)


def break_table(folder: Path) -> None:
    save_file({"linear.weight": torch.zeros(2, 2)}, folder / "model.safetensors")


def break_type(folder: Path) -> None:
    save_file({"embedding.weight": torch.zeros(300, 32, dtype=torch.int64)}, folder / "model.safetensors")


def break_size(folder: Path) -> None:
    save_file({"embedding.weight": torch.zeros(299, 32)}, folder / "model.safetensors")


def break_modules(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 1, "name": "1", "path": "", "type": "sentence_transformers.models.Pooling"})
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_table, "holds linear.weight and no table of token vectors"),
        (break_type, "a table of torch.int64"),
        (break_size, "the embedding table has 299 rows"),
        (break_modules, "a StaticEmbedding has nothing to pool"),
    ],
)
def test_what_is_no_table_of_tokens_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    write_tiny_static("static", tmp_path / "static")
    damage(tmp_path / "static")
    with pytest.raises(BundleError, match=message):
        Reference.load(resolve(str(tmp_path / "static")))


def test_only_the_mean_of_the_table_is_offered(tmp_path: Path) -> None:
    write_tiny_static("static", tmp_path / "static", limit=None)
    for head in (HeadSpec(pooling=Pooling.CLS), HeadSpec(layers=(0, -1))):
        with pytest.raises(BundleError, match="was made with"):
            resolve(str(tmp_path / "static"), head=head)
    assert resolve(str(tmp_path / "static")).spec.max_tokens == 512  # the library has no limit
