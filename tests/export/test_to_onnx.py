"""The export command: a JSON report as the last line, and one clear line for bad input."""

import json

import pytest

from export.proof import floors
from export.to_onnx import main
from mirror_runtime.bundle import Precision, check_files, read_manifest


@pytest.mark.trace
def test_the_last_line_of_stdout_is_the_report(tiny_bert, texts_file, tmp_path, capsys):
    output = tmp_path / "bundle"
    options = ["--pooling", "cls", "--precision", "fp32", "--max-tokens", "32", "--parity-texts", texts_file]
    assert main([str(tiny_bert), "--output", str(output), *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    manifest = read_manifest(output)
    assert report["fingerprint"] == manifest.fingerprint
    assert len(report["artifacts"]) == len(manifest.artifacts)
    assert manifest.encoder.max_tokens == 32


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
    output = tmp_path / "bundle"
    options = ["--pooling", "mean", "--precision", "fp32", "--parity-texts", str(pairs), "--sts", str(pairs)]
    assert main([str(tiny_bert), "--output", str(output), *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (score,) = report["artifacts"][0]["sts"]
    assert (score["name"], score["pairs"]) == ("pairs", 3)
    assert score["artifact"] == pytest.approx(score["reference"])
    assert "| pairs | 3 |" in (output / "README.md").read_text(encoding="utf-8")


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
