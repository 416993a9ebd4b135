"""The export command: a JSON report as the last line, heads that the bundle serves, one clear line for bad input."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from encoders.card import RUN_MARK, read_card
from encoders.depth import keep_layers
from encoders.reference import Reference
from encoders.source import HeadSpec, resolve
from encoders.write import write_layout
from export.bundle.head_options import HeadOptions, extend_head
from export.proof import floors
from export.to_onnx import main
from mirror_runtime import Encoder
from mirror_runtime.bundle import (
    Ditto,
    Pooling,
    Precision,
    VectorType,
    check_files,
    fingerprint,
    read_manifest,
    sha256_file,
)
from mirror_runtime.cli.main import main as mirror
from mirror_runtime.errors import InputError
from mirror_runtime.vectors import components

WORDS = ("cat", "dog", "mat", "river", "guitar", "man", "sat", "playing")
TEXTS = [f"the {a} is on a {b} {i}" for i, a in enumerate(WORDS) for b in WORDS] + ["", "cat " * 90, "[MASK] or [PAD]"]


@pytest.fixture
def export(tiny_bert, tmp_path, capsys):
    """Export to `tmp_path / "bundle"` with proofs on `TEXTS`, verify the bundle, and return its manifest."""
    lines, output = tmp_path / "texts.txt", tmp_path / "bundle"
    lines.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")

    def run(options):
        fixed = ["--precision", "fp32", "--max-tokens", "32", "--parity-texts", str(lines), "--output", str(output)]
        assert main([str(tiny_bert), *fixed, *options.replace("LINES", str(lines)).split()]) == 0
        report, manifest = json.loads(capsys.readouterr().out.splitlines()[-1]), read_manifest(output)
        check_files(output, manifest)
        assert report["fingerprint"] == manifest.fingerprint
        assert len(report["artifacts"]) == len(manifest.artifacts)
        assert manifest.encoder.max_tokens == 32
        assert mirror(["verify", str(output)]) == 0
        return manifest

    return run


@pytest.mark.trace
def test_padding_layers_whitening_a_cut_and_int8_in_one_command(export, tmp_path):
    """The heads: see the tests of the graph."""
    output = tmp_path / "bundle"
    manifest = export("--pooling mean_padded --layers 0,-1 --whiten LINES --whiten-dim 16 --dim 8 --vector-type int8")
    spec = manifest.encoder
    assert (spec.pooling, spec.pad_to, spec.layers) == (Pooling.MEAN_PADDED, 32, (0, -1))
    assert (spec.dim, spec.vector_type, spec.dense[0].out_features) == (8, VectorType.INT8, 16)
    fitted = json.loads((output / "whitening.json").read_text())
    assert (fitted["texts"], fitted["dim"]) == (sum(bool(text) for text in TEXTS), 16)
    assert {"whitening.json", "2_Dense/model.safetensors"} <= manifest.files.keys()
    # The bundle alone is as good as the encoder it was exported from.
    expected = Reference.load(resolve(str(output))).encode(TEXTS)
    for engine in ("onnxruntime", "openvino"):
        with Encoder.load(output, engine=engine, precision="fp32") as encoder:
            found = encoder.encode(TEXTS)
        assert found.dtype == np.int8
        np.testing.assert_allclose(components(found, spec), expected, atol=1.01 * (spec.int8_scale or 0))
        assert (components(found, spec) == expected).mean() > 0.99


@pytest.fixture
def elastic(tiny_bert, tmp_path):
    """A run folder that records one shallower depth and one smaller dimension."""
    whole = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN, max_tokens=32))
    spec = replace(whole.spec, trained_depths=(1,), trained_dims=(16,))
    write_layout(tmp_path / "run", model=whole.model, tokenizer=whole.tokenizer, spec=spec, card="")
    return whole, tmp_path / "run"


@pytest.mark.trace
def test_a_depth_lacks_the_later_layers_and_has_the_vectors_of_the_shorter_encoder(elastic, texts_file, tmp_path):
    (whole, run), output = elastic, tmp_path / "bundle"
    options = ["--precision", "fp32", "--parity-texts", texts_file, "--depth", "1", "--output", str(output)]
    assert main([str(run), *options]) == 0
    manifest = read_manifest(output)
    assert (manifest.encoder.trained_depths, manifest.encoder.trained_dims) == ((), (16,))
    with Encoder.load(output, precision="fp32") as encoder:
        found = encoder.encode(TEXTS)
    np.testing.assert_allclose(found, keep_layers(whole, [0]).encode(TEXTS), atol=1e-5)
    for weights in (output / "model.safetensors", output / "onnx" / "model.onnx"):
        assert b"layer.0." in weights.read_bytes()
        assert b"layer.1." not in weights.read_bytes()
    hashes = {"model.safetensors": sha256_file(run / "model.safetensors"), "tokenizer.json": "same"}
    assert manifest.fingerprint != fingerprint(manifest.encoder, hashes)
    assert main([str(output), *options[:-1], str(tmp_path / "again")]) == 0, "its whole depth is 1"


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--depth 3", "--depth 3: tiny-bert was trained for 1, 2"),
        ("--dim 8", "--dim is 8: tiny-bert was trained for 16"),
    ],
)
def test_what_an_elastic_encoder_was_not_trained_for_is_refused_by_name(elastic, tmp_path, capsys, option, problem):
    assert main([str(elastic[1]), *option.split(), "--output", str(tmp_path / "bundle")]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_cut_a_whitening_and_bits_keep_only_what_was_trained(elastic):
    whole = replace(elastic[0], spec=replace(elastic[0].spec, trained_dims=(12, 16), trained_depths=(1,)))
    for options, dims, depths in (
        (HeadOptions(dim=16), (12,), (1,)),
        (HeadOptions(vector_type=VectorType.BINARY), (16,), (1,)),
        (HeadOptions(whiten=tuple(map(str, range(100))), whiten_dim=4), (), ()),
    ):
        spec = extend_head(whole, options)[0].spec
        assert (spec.trained_dims, spec.trained_depths) == (dims, depths)


@pytest.mark.parametrize(
    ("options", "pooling", "head"),
    [
        (
            ["--head", "mask", "--template", 'a "{text}" is [MASK] .'],
            Pooling.MASK,
            HeadSpec(template='a "{text}" is [MASK] .'),
        ),
        (["--ditto", "1:0", "--layers", "0,-1"], None, HeadSpec(ditto=Ditto(layer=1, head=0), layers=(0, -1))),
    ],
)
def test_a_head_reaches_the_build(tiny_bert, tmp_path, monkeypatch, capsys, options, pooling, head):
    def build(request, *_):
        assert (request.pooling, request.head) == (pooling, head)
        raise InputError("it did")

    monkeypatch.setattr("export.bundle.build.build", build)
    assert main([str(tiny_bert), "--output", str(tmp_path / "bundle"), *options]) == 2
    assert "it did" in capsys.readouterr().err


def test_a_requested_precision_below_its_floor_is_status_1(
    tiny_bert, tiny_graphs, texts_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(floors.FLOORS, Precision.FP16, 1.0)
    output = tmp_path / "bundle"
    options = ["--pooling", "mean", "--precision", "fp32", "fp16", "--parity-texts", texts_file]
    assert main([str(tiny_bert), "--output", str(output), *options]) == 1
    shown = capsys.readouterr()
    assert "refused: onnxruntime fp16 padded" in shown.err
    assert "Worst: '" in shown.err
    report = json.loads(shown.out.splitlines()[-1])
    assert {entry["asked"] for entry in report["refused"]} == {True}
    assert {entry["precision"] for entry in report["artifacts"]} == {"fp32"}
    check_files(output, read_manifest(output))
    assert not list((output / "onnx").glob("*fp16*")), "unproven files are removed"


def test_quality_before_and_after_is_in_the_report_and_the_card(tiny_bert, tiny_graphs, tmp_path, capsys):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "score\tsentence1\tsentence2\n5\tthe cat sat\ta cat sat\n3\ta man\ta dog\n0\tmat\ta guitar playing\n",
        encoding="utf-8",
    )
    base, output = shutil.copytree(tiny_bert, tmp_path / "tiny-bert"), tmp_path / "bundle"
    (base / "README.md").write_text(f"---\nlicense: mit\n---\nIt helped.\n{RUN_MARK}\n![loss](loss.png)\n")
    options = ["--pooling", "mean", "--precision", "fp32", "--parity-texts", str(pairs), "--sts", str(pairs)]
    assert main([str(base), "--output", str(output), *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (score,) = report["artifacts"][0]["sts"]
    assert (score["name"], score["pairs"]) == ("pairs", 3)
    assert score["artifact"] == pytest.approx(score["reference"])
    card = read_card(output)
    assert card.terms == {"license": "mit"}
    assert "It helped." in card.body.partition("exported")[0]
    assert "| pairs | 3 |" in card.body
    assert "loss.png" not in card.body


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["./nowhere"], "does not exist"),
        (["{tiny}"], "--pooling mean"),
        (["{tiny}", "--pooling", "mean", "--precision", "int8", "--calibration", "missing.txt"], "missing.txt cannot"),
        (["{tiny}", "--pooling", "mean", "--sts", "missing.tsv"], "missing.tsv"),
        (["{tiny}", "--pooling", "mean", "--max-tokens", "65"], "64 positions"),
        (["{tiny}", "--pooling", "mean", "--parity-texts", "missing.txt"], "missing.txt cannot be read"),
        (["{tiny}", "--pooling", "mean", "--layers", "first"], "--layers first: must be numbers"),
        (["{tiny}", "--pooling", "mean", "--layers", "1,9"], "no layer 9"),
        (["{tiny}", "--pooling", "mean", "--depth", "1"], "was trained for 2 alone: tune.py --depths"),
        (["{tiny}", "--ditto", "1"], "--ditto 1: must be LAYER:HEAD"),
        (["{tiny}", "--pooling", "mean", "--dim", "33"], "--dim is 33: the vectors have 32"),
        (["{tiny}", "--pooling", "mean", "--whiten-dim", "4"], "pass --whiten CORPUS"),
        (["{tiny}", "--pooling", "mean", "--template", "no place"], "must contain {text} once"),
        (["{tiny}", "--pooling", "mask"], "needs a template"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(tiny_bert, tmp_path, capsys, arguments, problem):
    filled = [argument.replace("{tiny}", str(tiny_bert)) for argument in arguments]
    assert main([*filled, "--output", str(tmp_path / "bundle")]) == 2
    shown = capsys.readouterr().err
    assert problem in shown
    assert shown.count("error: ") == 1
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []
