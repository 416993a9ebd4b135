"""Certificates of one bundle and of several: every figure is from a manifest, and unlike measurements stay apart."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from export.bundle.card import WHITENING_FILE, certificate_card, describe_head
from export.certificates import main
from mirror_runtime.bundle import (
    MANIFEST_FILE,
    Activation,
    Artifact,
    Dense,
    Ditto,
    EngineName,
    Layout,
    Pooling,
    Precision,
    StsScore,
    VectorType,
    read_manifest,
    write_json,
)
from tests.support.fake_bundles import PARITY, artifact, encoder_spec
from tests.support.paths import ROOT

PACKED = Layout.PACKED
SCORE = StsScore(name="stsb-test", pairs=1379, sha256="0" * 64, reference=82.034, artifact=81.9)
WHITENING = Dense(in_features=8, out_features=4, bias=True, activation=Activation.IDENTITY)
EIGHT = dataclasses.replace(WHITENING, out_features=8)
TANH = dataclasses.replace(EIGHT, activation=Activation.TANH)


def changed(folder: Path, files: dict[str, str] | None = None, **spec: object) -> Path:
    """Change the head in a bundle's manifest."""
    manifest = read_manifest(folder)
    encoder = dataclasses.replace(manifest.encoder, **spec)  # type: ignore[arg-type]
    files = {**manifest.files, **(files or {})}
    write_json(dataclasses.replace(manifest, encoder=encoder, files=files), folder / MANIFEST_FILE)
    return folder


@pytest.fixture
def bundles(make_bundle: Callable[..., Path]) -> tuple[Path, Path]:
    """A bundle of three artifacts, and a whitened one of one artifact that was measured on a set."""

    def proven(precision: Precision, layout: Layout, size: int, **parity: object) -> Artifact:
        proof = dataclasses.replace(PARITY, **parity)  # type: ignore[arg-type]
        return artifact(EngineName.ONNXRUNTIME, precision, layout, size=size, parity=proof)

    sizes = {Layout.PADDED: 90_000_000, PACKED: 80_000_000}
    fp32 = [proven(Precision.FP32, *pair) for pair in sizes.items()]
    cosines = {"min_cosine": 0.9876549, "floor": 0.98, "neighbour_cosine": 0.99951239}
    int8 = proven(Precision.INT8, PACKED, 24_000_000, **cosines, sts=(SCORE,))
    plain = make_bundle(name="plain", artifacts=(*fp32, int8))
    other = dataclasses.replace(SCORE, sha256="1" * 64, artifact=82.1)
    whitened = make_bundle(name="whitened", artifacts=(proven(Precision.FP32, PACKED, 1, sts=(other,)),))
    return plain, changed(whitened, {WHITENING_FILE: "0" * 64}, dense=(WHITENING,), dim=2)


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.fixture
def table(tmp_path, capsys):
    """Write the table of some bundles, and return its text, what the terminal shows, and the report."""

    def make(*bundles: Path) -> tuple[str, str, dict]:
        output = tmp_path / "table.md"
        assert main([*map(str, bundles), "--output", str(output)]) == 0
        shown = capsys.readouterr()
        return output.read_text(encoding="utf-8"), shown.err, json.loads(shown.out.splitlines()[-1])

    return make


def test_every_artifact_is_a_row_and_nothing_is_rounded_up(bundles, table):
    text, _, _ = table(bundles[0])
    head, *body = rows(text)
    assert len(body) == 3
    assert dict(zip(head, body[2], strict=True)) == {
        "bundle": "plain",
        "head": "mean, unit length",
        "vector": "8 float32",
        "file": "`onnx/model_packed.onnx`",
        "engine": "onnxruntime",
        "precision": "int8",
        "layout": "packed",
        "MB": "24.0",
        "of fp32": "30.0%",
        "worst cosine": "0.987654",
        "floor": "0.980000",
        "batch invariance": "0.999512",
        "stsb-test": "82.03",
        "Δ": "-0.13",
    }
    assert body[0][-2:] == ["-", "-"], "no figure without a measurement"
    assert "Cosines of 1 texts (sha256 0000000000000000…) against tests." in text


def test_sets_of_one_name_and_other_content_have_columns_of_their_own(bundles, table):
    head, *body = rows(table(*bundles)[0])
    assert head[-4:] == ["stsb-test 00000000", "Δ", "stsb-test 11111111", "Δ"]
    assert body[2][-4:] == ["82.03", "-0.13", "-", "-"]
    assert body[3][:3] == ["whitened", "mean, whitened to 4, unit length", "2 float32"]
    assert body[3][-4:] == ["-", "-", "82.03", "+0.07"]


def test_bundles_proven_on_different_texts_have_a_line_each(bundles, table):
    path = bundles[1] / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["artifacts"][0]["parity"] |= {"texts": 7, "texts_sha256": "f" * 64}
    path.write_text(json.dumps(manifest))
    _, shown, _ = table(*bundles)
    assert "Cosines of 1 texts (sha256 0000000000000000…) against tests: plain." in shown
    assert "Cosines of 7 texts (sha256 ffffffffffffffff…) against tests: whitened." in shown


def test_the_terminal_shows_templates_as_they_are_and_the_last_line_is_the_report(
    bundles, table, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "140")
    changed(bundles[0], pooling=Pooling.MASK, template="a | {text} is [mask].")
    text, shown, report = table(*bundles)
    assert "every text set into `a | {text} is [mask].`" in shown
    assert "0.987654" in shown
    assert r"`a \| {text} is [mask].`" in text, "a bar would end the cell"
    assert [entry["bundle"] for entry in report["bundles"]] == [str(bundle) for bundle in bundles]
    assert report["bundles"][0]["artifacts"][2]["min_cosine"] == 0.9876549
    assert report["bundles"][0]["artifacts"][2]["floor"] == 0.98
    assert report["output"] == str(tmp_path / "table.md")


def test_bundles_of_one_name_are_shown_by_their_paths(make_bundle, table, tmp_path):
    artifacts = (artifact(EngineName.ONNXRUNTIME, Precision.FP32),)
    first = make_bundle(name="first", artifacts=artifacts)
    (tmp_path / "more").mkdir()
    second = make_bundle(name="more/first", artifacts=artifacts)
    assert [row[0] for row in rows(table(first, second)[0])[1:]] == [str(first), str(second)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"pooling": Pooling.MEAN_PADDED, "pad_to": 50}, "mean_padded to 50 tokens, unit length"),
        ({"pooling": Pooling.DITTO, "ditto": Ditto(layer=0, head=9)}, "ditto 0:9, unit length"),
        ({"layers": (1, -1), "normalize": False}, "mean, layers 1, -1 averaged, not normalised"),
        ({"dense": (TANH, WHITENING), "dim": 4}, "mean, dense to 8 and tanh, whitened to 4, unit length"),
        ({"vector_type": VectorType.BINARY}, "mean, unit length"),
    ],
)
def test_a_head_is_described_in_the_order_of_computation(bundles, spec, words):
    encoder = read_manifest(changed(bundles[0], **spec)).encoder
    assert describe_head(encoder, whitened=True) == words


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{plain}", "{root}"], "{root} is not a bundle"),
        (["{root}/nowhere"], "{root}/nowhere is not a bundle"),
        (["{plain}", "{plain}"], "{plain} is given twice"),
        (["{plain}", "--output", "{root}/no/table.md"], "{root}/no/table.md: No such file"),
    ],
)
def test_a_mistake_is_one_line(bundles, tmp_path, capsys, arguments, problem):
    places = {"plain": bundles[0], "root": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("error: ") == 1
    assert f"error: {problem.format(**places)}" in shown.err
    assert shown.out == ""


@pytest.mark.process
def test_run_by_path_it_loads_no_torch(bundles):
    command = [sys.executable, "-X", "importtime", "export/certificates.py", str(bundles[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "export.bundle.card" in imported
    assert not imported & {"torch", "transformers", "onnxruntime", "openvino"}


SPEC = encoder_spec()


ARTIFACTS = [
    artifact(EngineName.ONNXRUNTIME, Precision.FP32, Layout.PADDED, path="onnx/model.onnx"),
    artifact(
        EngineName.OPENVINO, Precision.BF16, parity=dataclasses.replace(PARITY, min_cosine=0.9999997, floor=0.9995)
    ),
]


def test_every_artifact_has_its_row_and_nothing_is_rounded_up():
    card = certificate_card(SPEC, ARTIFACTS, "0123456789abcdef")
    assert "`0123456789abcdef`" in card
    assert "| `onnx/model.onnx` | onnxruntime | fp32 |" in card
    row = next(line for line in card.splitlines() if "bf16" in line)
    assert "| 0.9995 | 0.999999 |" in row
    assert "points" not in card


def test_quality_has_a_column_for_each_artifact():
    measured = [dataclasses.replace(a, parity=dataclasses.replace(a.parity, sts=(SCORE,))) for a in ARTIFACTS]
    card = certificate_card(SPEC, measured, "0123456789abcdef")
    assert "| set | pairs | PyTorch | onnxruntime fp32 padded | openvino bf16 packed |" in card
    assert "| stsb-test | 1,379 | 82.03 | 81.90 | 81.90 |" in card


def test_only_heads_that_sentence_transformers_has_are_offered_to_it():
    assert "SentenceTransformer(" in certificate_card(SPEC, ARTIFACTS, "f")
    averaged = dataclasses.replace(SPEC, layers=(1, -1), dense=(EIGHT,), template="query: {text}")
    card = certificate_card(averaged, ARTIFACTS, "f")
    assert "SentenceTransformer(" not in card
    assert "layers 1, -1 averaged, dense to 8, unit length, every text set into `query: {text}`" in card
