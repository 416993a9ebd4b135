"""What artifacts cost on the user's own texts: measured, recorded in bundle, card and table, refused on request."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.statistics import Bootstrap
from export.bundle.card import PROBES_FILE, read_costs
from export.certificates import main as certificates
from export.to_onnx import main
from mirror_runtime.bundle import check_files, read_manifest
from training.own import FEWEST

RARE = ["cat", "dog", "man", "river", "mat", "guitar", "sat", "playing"]
CONTENT, PARTS = "content, accuracy", "parts, MRR"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("evaluation.probes.COMMON_WORDS", 5)
    monkeypatch.setattr("evaluation.probes.RARE", (2, 300))
    path = tmp_path / "own.jsonl"
    words = [(f"{a} {b} {c}", f"the {a} {b} {c} is on a no") for a in RARE for b in RARE for c in RARE]
    path.write_text("".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in words))
    return path


@pytest.fixture
def export(tiny_bert, tiny_graphs, texts_file, own, tmp_path, capsys):
    def run(*options: str) -> tuple[int, Any, str]:
        fixed = ["--pooling", "mean", "--precision", "fp32", "--parity-texts", texts_file, "--own", str(own)]
        status = main([str(tiny_bert), "--output", str(tmp_path / "bundle"), *fixed, *options])
        shown = capsys.readouterr()
        return status, json.loads(shown.out.splitlines()[-1]) if shown.out else None, " ".join(shown.err.split())

    return run


def shares(monkeypatch: pytest.MonkeyPatch, *after: float) -> None:
    """Replace what is measured: 100 of 100 questions before, then these shares of each artifact."""
    left: Iterator[float] = iter((1.0, *after))
    monkeypatch.setattr(
        "export.proof.own_texts.evaluate_probes",
        lambda *_: [Bootstrap().mean("probe", "own", CONTENT, np.arange(100) < 100 * next(left))],
    )


def test_equal_vectors_cost_nothing_and_every_record_says_so(export, tmp_path, capsys, monkeypatch):
    status, report, shown = export("--max-probe-loss", "0")
    bundle = tmp_path / "bundle"
    manifest, costs = read_manifest(bundle), read_costs(bundle)
    check_files(bundle, manifest)
    assert (status, PROBES_FILE in manifest.files) == (0, True)
    assert "worse on your own texts" not in shown
    assert len(costs.costs) == 2 * len(manifest.artifacts) == 6
    for artifact, entry in zip(manifest.artifacts, report["artifacts"], strict=True):
        assert [*costs.of(artifact)] == [CONTENT, PARTS] == [*entry["probes"]]
        cost = costs.of(artifact)[PARTS]
        assert (cost.gain.low, cost.gain.value, cost.gain.high) == (0, 0, 0)
        assert 50 <= cost.items <= FEWEST
        assert 0 < cost.before == cost.after
        assert entry["probes"][PARTS]["before"] == cost.before
    card = (bundle / "README.md").read_text()
    assert f"| {PARTS} | {cost.items} | {cost.before:.2f} | +0.00 [+0.00, +0.00] | +0.00" in card
    assert "PyTorch" in costs.reference
    assert certificates([str(bundle), "--output", str(tmp_path / "table.md")]) == 0
    assert f"| {cost.before:.2f} | +0.00 [+0.00, +0.00] |" in (tmp_path / "table.md").read_text()
    assert json.loads(capsys.readouterr().out)["bundles"][0]["artifacts"][0]["probes"][PARTS]["items"] == cost.items


@pytest.mark.parametrize(
    ("after", "options", "status", "message"),
    [
        (
            (1, 1, 0.8),
            (),
            0,
            f"worse on your own texts: openvino fp32 packed: {CONTENT} goes from 100.0 to 80.0 (-20.00 [",
        ),
        ((1, 1, 0.8), ("--max-probe-loss", "5"), 1, "20.00 ["),
        ((1, 1, 0.8), ("--max-probe-loss", "19"), 0, "worse on your own texts"),  # not surely more than 19
        ((0.8,), ("--max-probe-loss", "5"), 2, "surely more than --max-probe-loss 5: choose another precision"),
    ],
)
def test_harm_is_said_and_refused_beyond_a_bound(export, tmp_path, monkeypatch, after, options, status, message):
    shares(monkeypatch, *after)
    found, report, shown = export(*options)
    assert found == status
    assert message in shown
    if status == 2:
        assert not (tmp_path / "bundle").exists()
        return
    engines = [artifact["engine"] for artifact in report["artifacts"]]
    assert engines == ["onnxruntime", "onnxruntime", "openvino"][: 3 - status]
    assert len(report["refused"]) == status


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (None, ("--max-probe-loss", "1"), "--max-probe-loss needs texts to measure on: pass --own FILE"),
        (["one two"] * 9, (), "1 texts are too few to measure on: 50 are needed"),
        ([f"alpha beta {i} {i}" for i in range(200)], (), "--own: the texts allow none of the probes content, parts"),
        ("absent", (), "absent.txt"),
    ],
)
def test_texts_that_cannot_be_used_are_one_error(tiny_bert, tmp_path, capsys, texts, options, message):
    path = tmp_path / ("absent.txt" if texts == "absent" else "own.txt")
    if isinstance(texts, list):
        path.write_text("\n".join(texts))
    own = () if texts is None else ("--own", str(path))
    assert main([str(tiny_bert), "--output", str(tmp_path / "bundle"), "--pooling", "mean", *own, *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "bundle").exists()
