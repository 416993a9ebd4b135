"""Bundles appear complete or not at all, and only proven."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from encoders.reference import Reference
from encoders.source import resolve
from evaluation.probes import Probe
from export.bundle import build as building
from export.bundle.build import Request, build
from export.bundle.head_options import HeadOptions
from export.proof import parity
from export.proof.proof_texts import CANARIES
from mirror_runtime import Encoder, Reranker
from mirror_runtime.bundle import EngineName, Layout, Pooling, Precision, check_files, read_canaries, read_manifest
from mirror_runtime.engines.openvino_engine import OpenVinoEngine
from mirror_runtime.errors import BundleError, InputError, MissingExtra, ParityError
from mirror_runtime.folders import whole_folder
from mirror_runtime.verify import verify
from tests.support.tiny_encoders import write_pylate, write_tiny_encoder

TEXTS = ("", "the cat sat on the mat.", "a man is playing a guitar", "dog " * 80, "😀 river", *"abcdefgh")


def request(source: Path, output: Path, **changes) -> Request:
    base = Request(encoder=str(source), output=output, pooling=Pooling.MEAN, texts=TEXTS, precisions=(Precision.FP32,))
    return dataclasses.replace(base, **changes)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_is_complete_hashed_and_gives_the_reference_vectors(tiny_bundle, tiny_bert):
    from sentence_transformers import SentenceTransformer

    manifest = read_manifest(tiny_bundle)
    check_files(tiny_bundle, manifest)
    on_disk = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()} - {"manifest.json"}
    assert on_disk == set(manifest.files)
    assert [a.layout for a in manifest.artifacts][:2] == [Layout.PADDED, Layout.PACKED]
    expected = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN)).encode(TEXTS)
    with Encoder.load(tiny_bundle, engine="onnxruntime", precision="fp32") as encoder:
        np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-4)
    peer = SentenceTransformer(str(tiny_bundle), device="cpu")
    np.testing.assert_allclose(peer.encode(list(TEXTS)), expected, atol=1e-4)
    assert [canary.text for canary in read_canaries(tiny_bundle)] == list(CANARIES)


def test_a_wrong_head_fails_the_export_and_leaves_nothing(tiny_bert, tiny_graphs, tmp_path):
    with pytest.raises(ParityError, match="onnxruntime fp32 padded differs"):
        build(request(tiny_bert, tmp_path / "bundle", pooling=Pooling.CLS))
    assert left_behind(tmp_path) == []


def test_one_wrong_shape_is_refused(tiny_bert, tiny_graphs, tmp_path, monkeypatch):
    run = OpenVinoEngine.run

    def wrong(self, rows):
        vectors = run(self, rows)
        return vectors[:, ::-1] if rows.shape == (21, 48) else vectors

    monkeypatch.setattr(OpenVinoEngine, "run", wrong)
    (refused,) = build(request(tiny_bert, tmp_path / "bundle")).refused
    assert "openvino fp32 packed in rows of 21 x 48 tokens differs from" in refused.reason


def set_weight(source: Path, value: float) -> None:
    """Set one weight of an encoder's padding token."""
    weights = load_file(source / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def test_overwriting_keeps_the_old_bundle_until_the_new_one_is_proven(
    tiny_bundle, tiny_bert, tiny_graphs, tmp_path, monkeypatch
):
    old = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = (old / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        build(request(tiny_bert, old))

    def refuse(*_args):
        raise ParityError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(building, "prove_artifact", refuse)
        with pytest.raises(ParityError, match="on purpose"):
            build(request(tiny_bert, old, overwrite=True))
    assert (old / "manifest.json").read_bytes() == before
    check_files(old, read_manifest(old))
    build(request(tiny_bert, old, overwrite=True, max_tokens=32))
    assert read_manifest(old).encoder.max_tokens == 32
    assert left_behind(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda source: (source / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda source: os.truncate(source / "model.safetensors", 5000), "cannot be loaded"),
        (lambda source: set_weight(source, np.nan), r"NaN or infinite numbers: .*word_embeddings\.weight"),
    ],
    ids=["tokenizer", "weights", "NaN"],
)
def test_a_bad_encoder_is_one_error_and_a_good_bundle_stays(tiny_bundle, tiny_bert, tmp_path, spoil, problem):
    """What else is wrong with a folder: see the tests of `encoders.source`."""
    good = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    source = shutil.copytree(tiny_bert, tmp_path / "source")
    spoil(source)
    with pytest.raises(BundleError, match=problem):
        build(request(source, good, overwrite=True))
    assert read_manifest(good) == read_manifest(tiny_bundle)
    check_files(good, read_manifest(good))
    assert left_behind(tmp_path) == ["bundle", "source"]


def test_two_exports_into_one_folder_do_not_meet(tiny_bundle, tiny_bert, tmp_path):
    good = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with whole_folder(good, overwrite=True, marker="manifest.json") as other:
        with pytest.raises(InputError, match="another process is writing"):
            build(request(tiny_bert, good, overwrite=True))
        assert other.is_dir()
        shutil.copytree(tiny_bundle, other, dirs_exist_ok=True)
    check_files(good, read_manifest(good))


def spoiled(monkeypatch, engine, precision):
    """Rotate the components of the vectors of one engine and precision."""
    right = parity.prove

    def rotated(encode, expected, floors, *, what):
        if what != name:
            return right(encode, expected, floors, what=what)
        return right(lambda texts: np.roll(encode(texts), 1, axis=1), expected, floors, what=what)

    name = f"{engine} {precision} packed"
    monkeypatch.setattr(parity, "prove", rotated)


def test_an_artifact_below_its_floor_is_left_out_and_the_rest_stays(tiny_bert, tiny_graphs, tmp_path, monkeypatch):
    spoiled(monkeypatch, "openvino", "fp32")
    output = tmp_path / "bundle"
    export = build(request(tiny_bert, output))
    (refused,) = export.refused
    assert (refused.name, refused.requested) == ("openvino fp32 packed", True)
    assert "Worst: " in refused.reason
    manifest = read_manifest(output)
    check_files(output, manifest)
    assert {a.engine for a in manifest.artifacts} == {EngineName.ONNXRUNTIME}
    assert (output / "onnx/model_packed.onnx").is_file(), "another artifact has proven it"
    assert "openvino" not in (output / "README.md").read_text(encoding="utf-8")
    again = build(request(tiny_bert, tmp_path / "again", precisions=None))
    assert [entry.requested for entry in again.refused] == [False]


def test_without_the_fp32_graphs_there_is_no_bundle(tiny_bert, tiny_graphs, tmp_path, monkeypatch):
    spoiled(monkeypatch, "onnxruntime", "fp32")
    with pytest.raises(ParityError, match="onnxruntime fp32 packed differs"):
        build(request(tiny_bert, tmp_path / "bundle"))
    assert left_behind(tmp_path) == []


def test_a_full_disk_is_one_clear_error(tiny_bert, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "export_graphs", full)
    with pytest.raises(InputError, match="No space left on device"):
        build(request(tiny_bert, tmp_path / "bundle"))
    assert left_behind(tmp_path) == []


def test_a_precision_with_files_of_its_own_has_the_names_that_tools_look_for(tiny_bert, tiny_graphs, tmp_path):
    output = tmp_path / "bundle"
    build(request(tiny_bert, output, precisions=(Precision.FP32, Precision.INT8), calibration=TEXTS))
    manifest = read_manifest(output)
    check_files(output, manifest)
    (padded,) = (a for a in manifest.artifacts if (a.precision, a.layout) == (Precision.INT8, Layout.PADDED))
    assert padded.path == "onnx/model_quantized.onnx"
    assert manifest.files[padded.path] == manifest.files["onnx/model_qint8_avx512_vnni.onnx"]
    assert padded.parity.neighbour_cosine >= 0.999
    proven = {a.path for a in manifest.artifacts} | {"onnx/model_qint8_avx512_vnni.onnx"}
    assert {path.relative_to(output).as_posix() for path in (output / "onnx").iterdir()} == proven


def test_a_precision_that_cannot_hold_the_weights_costs_only_its_own_files(
    tiny_bert, tiny_graphs, tmp_path, monkeypatch
):
    source = shutil.copytree(tiny_bert, tmp_path / "source")
    set_weight(source, 1e5)
    export = build(request(source, tmp_path / "bundle", precisions=(Precision.FP32, Precision.FP16)))
    (refused,) = export.refused
    assert (refused.name, refused.requested) == ("fp16", True)
    assert "fp16 cannot hold" in refused.reason
    check_files(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))
    assert not list((tmp_path / "bundle/onnx").glob("*fp16*"))
    monkeypatch.setattr(building, "installed", lambda _: False)
    with pytest.raises(MissingExtra, match="openvino"):
        build(request(tiny_bert, tmp_path / "bundle", precisions=(Precision.BF16,)))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    write_tiny_encoder("bert", folder := tmp_path_factory.mktemp("cross") / "published", layers=1, labels=1)
    return folder


@pytest.mark.slow
def test_a_cross_encoder_becomes_a_reranker_whose_packed_scores_are_pytorchs(cross_encoder, tmp_path):
    request = Request(encoder=str(cross_encoder), output=tmp_path / "b", texts=TEXTS, precisions=(Precision.FP32,))
    manifest = build(request).manifest
    assert manifest.encoder.pooling is Pooling.RERANK
    packed = next(made for made in manifest.artifacts if made.layout is Layout.PACKED)
    assert [tensor.name for tensor in packed.inputs][3:] == ["token_type_ids"]
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval()
    tokenizer = Reference.load(resolve(str(cross_encoder), text_vectors=False)).tokenizer
    options = {"truncation": True, "max_length": 64, "padding": True, "return_tensors": "pt"}
    with torch.inference_mode():
        expected = model(**tokenizer(*map(list, zip(*pairs, strict=True)), **options)).logits[:, 0].numpy()
    with Reranker.load(request.output, engine="onnxruntime", precision="fp32") as reranker:
        np.testing.assert_allclose(reranker.encoder.encode(pairs)[:, 0], expected, atol=1e-5)
        np.testing.assert_allclose(reranker.scores(*pairs[5][:1], [pairs[5][1]], raw=True), expected[5:6], atol=1e-5)
    assert all(check.agrees for check in verify(request.output))


@pytest.mark.trace
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_pooling_tokens_keeps_each_tokens_vector_as_transformers_computes_it(family, tmp_path, traces_from_cache):
    write_tiny_encoder(family, tmp_path / "published")
    write_pylate(tmp_path / "published")
    texts = [*TEXTS, "[Q] what is a cat", "a long text " * 40]
    request = Request(
        encoder=str(tmp_path / "published"), output=tmp_path / "b", texts=tuple(texts), precisions=(Precision.FP32,)
    )
    manifest = build(request).manifest
    assert (manifest.encoder.pooling, manifest.encoder.dim, manifest.encoder.normalize) == (Pooling.TOKENS, 8, True)
    assert {(a.layout, a.outputs[-1].name) for a in manifest.artifacts} == {
        (Layout.PADDED, "token_embeddings"),
        (Layout.PACKED, "embedding"),
    }
    model = transformers.AutoModel.from_pretrained(tmp_path / "published").eval()
    tokenizer = Reference.load(resolve(str(tmp_path / "published"), text_vectors=False)).tokenizer
    weight = torch.from_numpy(load_file(tmp_path / "published/1_Dense/model.safetensors")["linear.weight"])
    with Encoder.load(request.output, engine="onnxruntime", precision="fp32") as encoder:
        assert encoder.prompts == {"query": "[Q] ", "document": "[D] "}
        for text, found in zip(texts, encoder.encode_tokens(texts), strict=True):
            inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
            with torch.inference_mode():
                expected = torch.nn.functional.normalize(model(**inputs).last_hidden_state[0] @ weight.T, dim=-1)
            np.testing.assert_allclose(found.vectors, expected.numpy(), atol=1e-5)
    assert all(check.agrees for check in verify(request.output))


@pytest.mark.parametrize(
    ("pooling", "changes", "problem"),
    [
        (None, {"precisions": (Precision.INT8,)}, "a reranker is not quantised to int8"),
        (None, {"head_options": HeadOptions(dim=1)}, "one score and no vectors"),
        (None, {"probes": (Probe(name="content", questions=("a",), answers=("b",)),)}, "leave out .* and --own"),
        (Pooling.TOKENS, {"precisions": (Precision.INT8,)}, "pooling tokens is not quantised to int8"),
        (Pooling.TOKENS, {"head_options": HeadOptions(dim=1)}, "pooling tokens has no vector of a text"),
        (Pooling.TOKENS, {"sets": (None,)}, "leave out --sts"),
    ],
)
def test_what_an_unusual_head_has_not_is_refused(cross_encoder, tmp_path, pooling, changes, problem):
    with pytest.raises(InputError, match=problem):
        build(request(cross_encoder, tmp_path / "b", pooling=pooling, **changes))
