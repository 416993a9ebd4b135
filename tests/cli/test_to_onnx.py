"""The export command: one JSON line at the end, one clear line where the input cannot be used."""

import json

import pytest

from export.to_onnx import main
from mirror_runtime.bundle import read_manifest


def test_the_last_line_of_stdout_is_the_report(tiny_bert, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat\na man is playing a guitar\n", encoding="utf-8")
    output = tmp_path / "bundle"
    options = ["--pooling", "cls", "--precision", "fp32", "--max-tokens", "32", "--parity-texts", str(texts)]
    assert main([str(tiny_bert), "--output", str(output), *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    manifest = read_manifest(output)
    assert report["fingerprint"] == manifest.fingerprint
    assert len(report["artifacts"]) == len(manifest.artifacts)
    assert manifest.encoder.max_tokens == 32


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["./nowhere"], "does not exist"),
        (["{tiny}"], "--pooling mean"),
        (["{tiny}", "--pooling", "mean_padded"], "mean_padded"),
        (["{tiny}", "--pooling", "mean", "--precision", "int8"], "int8"),
        (["{tiny}", "--pooling", "mean", "--max-tokens", "65"], "64 positions"),
        (["{tiny}", "--pooling", "mean", "--parity-texts", "missing.txt"], "missing.txt cannot be read"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(tiny_bert, tmp_path, capsys, arguments, problem):
    filled = [argument.format(tiny=tiny_bert) for argument in arguments]
    assert main([*filled, "--output", str(tmp_path / "bundle")]) == 2
    shown = capsys.readouterr().err
    assert problem in shown
    assert shown.count("error: ") == 1
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []
