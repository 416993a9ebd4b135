"""The script for the day a GPU is there, rehearsed on the CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_passes
from benchmarks.gpu_passes import Replayed
from benchmarks.report.storage import read_report
from mirror_runtime.errors import MissingExtra
from mirror_runtime.packing import PackedRows
from tests.support.trace_cache import cached_traces


def rehearse(output: Path, *options: str) -> int:
    return gpu.main(["--device", "cpu", "--tiny", "--no-tune", "--output", str(output), *options])


@pytest.mark.trace
@pytest.mark.slow  # it loads sentence-transformers and runs eight ways
def test_every_party_has_the_references_vectors_and_a_second_run_measures_what_is_left(monkeypatch, tmp_path, capsys):
    assert rehearse(tmp_path / "gpu", "--minutes", "0") == 1
    report = read_report(tmp_path / "gpu")
    assert not report.measurements
    assert {"no time was left: run the same command again"} == {failure.reason for failure in report.failures}
    with cached_traces():
        assert rehearse(tmp_path / "gpu") == 0
    report = read_report(tmp_path / "gpu")
    worst = {one.party: one.median for one in report.select("gpu", "worst cosine to fp32")}
    assert len(worst) == 8
    for party, cosine in worst.items():
        assert cosine > (0.9999 if "bf16" not in party else 0.999), party
    assert {one.party for one in report.select("gpu", "share of products")} == set(worst)
    (missing,) = report.failures
    assert "tensorrt is not installed" in missing.reason
    text = (tmp_path / "gpu" / "report.md").read_text()
    assert all(party in text for party in worst)
    assert len(report.facts.resumed) == 1
    capsys.readouterr()
    measured: list[str] = []
    monkeypatch.setattr(gpu, "_measure", lambda recorder, party, *_: measured.append(party))
    assert rehearse(tmp_path / "gpu") == 0
    assert measured == ["tensorrt fp16"], "what failed is tried again, and nothing else"
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {figure["party"] for figure in line["figures"]} == {*worst, "bf16 products"}
    (tmp_path / "gpu" / "report.json").write_text("{}")
    assert rehearse(tmp_path / "gpu") == 2


def test_a_party_that_fails_and_a_gpu_that_is_missing_are_named(monkeypatch, tmp_path, capsys):
    def broken(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "_parties", lambda *_: [("broken", broken)])
    assert rehearse(tmp_path / "gpu") == 1
    assert "an illegal memory access was encountered" in (tmp_path / "gpu" / "report.md").read_text()
    assert gpu.main(["--output", str(tmp_path / "other")]) == 2
    assert "GPU" in capsys.readouterr().err
    assert rehearse(tmp_path / "gpu", "--batch-tokens", "64") == 2
    assert "the settings of the interrupted run" in capsys.readouterr().err
    assert gpu.main(["--device", "cdua", "--tiny", "--output", str(tmp_path / "typo")]) == 2


@pytest.mark.parametrize(("error", "status"), [(None, 1), (MissingExtra("tensorrt", "tensorrt"), 0)])
def test_vectors_below_the_floor_fail_and_a_missing_package_does_not(monkeypatch, tmp_path, error, status):
    def parties(prepared: gpu_passes.Prepared, *_: Any) -> list[Any]:
        def build() -> gpu_passes.Pass:
            if error is not None:
                raise error
            return lambda: np.ones((len(prepared.texts), 32), np.float32)

        return [("PyTorch packed fp16", build)]

    monkeypatch.setattr(gpu, "_parties", parties)
    assert rehearse(tmp_path / "gpu") == status


def test_a_token_of_bert_base_takes_170_million_operations():
    assert gpu_passes.SIZES[gpu_passes.BASE].flop_per_token == 12 * 2 * (4 * 768**2 + 2 * 768 * 3072) == 169_869_312


def test_each_shape_is_captured_once_and_replayed_from_the_same_tensors(monkeypatch):
    """With a stand-in for CUDA, whose graphs run the captured function again on what its inputs hold then."""
    captured = []

    def capture(self: Replayed, inputs: list[torch.Tensor]) -> Any:
        output = torch.zeros(inputs[0].shape)
        captured.append(tuple(inputs[0].shape))

        class Graph:
            def replay(self) -> None:
                output.copy_(forward(*inputs))

        return inputs, output, Graph()

    def forward(ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return (ids + 10 * positions + 100 * segments).float()

    monkeypatch.setattr(Replayed, "_capture", capture)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    run, random = Replayed(forward, "cuda"), np.random.default_rng(0)
    for shape in ((1, 16), (4, 64), (1, 16), (4, 64)):
        ids, positions, segments = random.integers(0, 9, (3, *shape))
        rows = PackedRows(input_ids=ids, position_ids=positions, segment_ids=segments)
        np.testing.assert_array_equal(run(rows), ids + 10 * positions + 100 * segments)
    assert captured == [(1, 16), (4, 64)]
