"""OpenVINO IR in a bundle: the names that others load, the proofs, and a bundle that failures do not change."""

import json
import sys

import pytest

from export import to_openvino
from export.bundle import openvino_ir
from export.bundle.openvino_ir import add_ir
from export.proof import floors
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Layout, Precision, check_files, read_manifest, sha256_file
from mirror_runtime.errors import InputError, MissingExtra, ParityError
from mirror_runtime.host import has_bf16

TEXTS = ("", "the cat sat on the mat.", "a man is playing a guitar", "dog " * 80, "😀 river", *"abcdefgh")


def content(bundle):
    return {path.relative_to(bundle).as_posix(): sha256_file(path) for path in bundle.rglob("*") if path.is_file()}


def test_the_padded_graph_is_proven_and_added(bundle, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text for text in TEXTS if text), encoding="utf-8")
    assert to_openvino.main([str(bundle), "--precision", "fp32", "--parity-texts", str(texts)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert row["path"] == "openvino/openvino_model.xml"
    assert row["min_cosine"] >= 0.99999
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert "openvino/openvino_model.bin" in manifest.files
    artifact = manifest.artifacts[-1]
    assert (artifact.engine, artifact.layout) == (EngineName.OPENVINO, Layout.PADDED)
    assert artifact.size == sum((bundle / f"openvino/openvino_model.{kind}").stat().st_size for kind in ("xml", "bin"))


@pytest.mark.skipif(not has_bf16(), reason="OpenVINO runs bf16 only on CPUs with bf16 instructions")
def test_the_packed_bf16_graph_is_served(bundle):
    (artifact,) = add_ir(bundle, [Precision.BF16], texts=TEXTS)
    assert artifact.path == "openvino/openvino_model_packed_bf16.xml"
    with Encoder.load(bundle, engine="openvino", precision="bf16") as encoder:
        assert encoder.encode(["the cat sat"]).shape == (1, 32)


def test_a_missed_floor_and_a_precision_that_the_bundle_lacks_do_not_change_it(bundle, monkeypatch):
    before = content(bundle)
    monkeypatch.setitem(floors.FLOORS, Precision.FP32, 1.0)  # not one bit may differ
    with pytest.raises(ParityError):
        add_ir(bundle, [Precision.FP32], texts=TEXTS)
    with pytest.raises(InputError, match=r"no padded graph in int8: export it with export/to_onnx.py --precision int8"):
        add_ir(bundle, [Precision.INT8], texts=TEXTS)
    with pytest.raises(InputError, match="fp16 is not written as OpenVINO IR"):
        add_ir(bundle, [Precision.FP16], texts=TEXTS)
    assert content(bundle) == before


def test_a_graph_that_openvino_cannot_read_and_the_missing_extra_are_named(bundle, tmp_path, monkeypatch):
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"openvino cannot read broken\.onnx"):
        openvino_ir._convert(tmp_path / "broken.onnx", tmp_path / "broken.xml")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match="openvino"):
        add_ir(bundle, [Precision.FP32], texts=TEXTS)
