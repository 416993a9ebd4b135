"""Bundles appear whole or not at all, and only proven."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from export import build as building
from export import graphs
from export.build import Request, build
from mirror_runtime import Encoder
from mirror_runtime.bundle import Layout, Pooling, Precision, check_files, read_canaries, read_manifest
from mirror_runtime.errors import InputError, MissingExtra, ParityError
from training.reference import Reference
from training.source import resolve

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("", "the cat sat on the mat.", "a man is playing a guitar", "dog " * 80, "😀 river", *"abcdefgh")


def request(source: Path, output: Path, **changes) -> Request:
    base = Request(encoder=str(source), output=output, pooling=Pooling.MEAN, texts=TEXTS, precisions=(Precision.FP32,))
    return dataclasses.replace(base, **changes)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def bundle(tiny_bert, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("export") / "bundle"
    build(request(tiny_bert, output))
    return output


def test_a_bundle_is_complete_hashed_and_gives_the_reference_vectors(bundle, tiny_bert):
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()} - {"manifest.json"}
    assert on_disk == set(manifest.files)
    assert [a.layout for a in manifest.artifacts][:2] == [Layout.PADDED, Layout.PACKED]
    expected = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN)).encode(TEXTS)
    with Encoder.load(bundle, engine="onnxruntime", precision="fp32") as encoder:
        np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-4)
    assert len(read_canaries(bundle)) == 8


def test_sentence_transformers_reads_the_bundle(bundle, tiny_bert):
    from sentence_transformers import SentenceTransformer

    expected = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN)).encode(TEXTS)
    found = SentenceTransformer(str(bundle), device="cpu").encode(list(TEXTS))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_wrong_head_fails_the_export_and_leaves_nothing(tiny_bert, tmp_path, monkeypatch):
    right = graphs.PackedEncoder.__init__

    def wrong(self, model, pooling, normalize):
        right(self, model, Pooling.CLS, normalize)

    monkeypatch.setattr(graphs.PackedEncoder, "__init__", wrong)
    with pytest.raises(ParityError, match="packed"):
        build(request(tiny_bert, tmp_path / "bundle"))
    assert left_behind(tmp_path) == []


def test_nan_weights_are_refused(tiny_bert, tmp_path):
    source = shutil.copytree(tiny_bert, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = next(key for key in weights if key.endswith("output.dense.bias"))
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError, match="NaN or infinity"):
        build(request(source, tmp_path / "bundle"))
    assert left_behind(tmp_path) == ["source"]


def test_overwriting_keeps_the_old_bundle_until_the_new_one_is_proven(bundle, tiny_bert, tmp_path, monkeypatch):
    old = shutil.copytree(bundle, tmp_path / "bundle")
    before = (old / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        build(request(tiny_bert, old))

    def refuse(*_args):
        raise ParityError("on purpose")

    monkeypatch.setattr(building, "prove_padded", refuse)
    with pytest.raises(ParityError, match="on purpose"):
        build(request(tiny_bert, old, overwrite=True))
    assert (old / "manifest.json").read_bytes() == before
    check_files(old, read_manifest(old))
    monkeypatch.undo()
    build(request(tiny_bert, old, overwrite=True, pooling=Pooling.CLS))
    assert read_manifest(old).encoder.pooling is Pooling.CLS
    assert left_behind(tmp_path) == ["bundle"]


def test_a_full_disk_is_one_clear_error(tiny_bert, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        build(request(tiny_bert, tmp_path / "bundle"))
    assert left_behind(tmp_path) == []


def test_what_cannot_be_proven_is_not_promised(tiny_bert, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="int8"):
        build(request(tiny_bert, tmp_path / "bundle", precisions=(Precision.INT8,)))
    monkeypatch.setattr(building, "installed", lambda _: False)
    with pytest.raises(MissingExtra, match="openvino"):
        build(request(tiny_bert, tmp_path / "bundle", precisions=(Precision.BF16,)))


@pytest.mark.slow
def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(tiny_bert, tmp_path):
    output = tmp_path / "bundle"
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"the cat sat on mat {i} times\n" for i in range(3000)), encoding="utf-8")
    options = ["--pooling", "mean", "--precision", "fp32", "--parity-texts", str(texts)]
    command = [sys.executable, "export/to_onnx.py", str(tiny_bert), "--output", str(output), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob(".bundle.partial-*/onnx/model_packed.onnx")):
            assert process.poll() is None, "the export ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (partial,) = tmp_path.glob(".bundle.partial-*")
    assert not output.exists()
    assert not (partial / "manifest.json").exists()
    build(request(tiny_bert, output))
    assert left_behind(tmp_path) == ["bundle", "texts.txt"]
