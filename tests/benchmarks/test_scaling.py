"""Suite scaling: distinct texts, fresh processes on fewer cores, steps that go on, and what the report says of it."""

import dataclasses
import os

import pytest

from benchmarks import scaling
from benchmarks.changes import Verdict
from benchmarks.compare import compare
from benchmarks.markdown import render_markdown
from benchmarks.resume import restore
from benchmarks.scaling import cores_to_try
from benchmarks.scaling_process import NUMBERS, distinct
from mirror_runtime.errors import EngineError


def test_no_text_comes_twice_and_no_size_has_numbers_of_its_own():
    texts = list(distinct(["a b", "c"], 5000))
    assert len(set(texts)) == 5000
    assert texts[:2] == ["a b 0000000", "c 6180339"]
    numbers = [int(text.split()[-1]) for text in distinct(["a"], 1000)]
    below = [sum(number < NUMBERS * share for number in numbers) / 1000 for share in (0.1, 0.5)]
    assert below == pytest.approx([0.1, 0.5], abs=0.01)  # the first thousand are spread over all numbers


def test_cores_double_and_end_with_all():
    assert [cores_to_try(cores) for cores in (1, 2, 3, 8, 12)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12],
    ]  # fmt: skip


def test_a_process_is_on_fewer_cores_before_it_starts(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, os; print(json.dumps(sorted(os.sched_getaffinity(0))))")
    monkeypatch.setattr(scaling, "SCRIPT", script)
    mine = sorted(os.sched_getaffinity(0))
    assert scaling._ask({}, cores=1) == mine[:1]
    assert scaling._ask({}) == mine


def test_a_process_that_fails_is_named_by_its_last_line(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise KeyError('what')")
    monkeypatch.setattr(scaling, "SCRIPT", script)
    with pytest.raises(EngineError, match="its process ended with status 1: KeyError: 'what'"):
        scaling._ask({})


def test_sizes_cores_and_callers_are_shown_beside_what_they_are_measured_by(report):
    text = render_markdown(report, {})
    assert "| openvino bf16 | 1,000 | 400.0 | 1.067 | 17.00 | 300 | 310 | 2 | 0.999800 |" in text
    assert "| openvino bf16 | 16,000 | 375.0 | – | 17.00 | 300 | 320 | 1 | 0.999800 |" in text
    assert "| openvino bf16 | 2 | 2 | 190 | 1.90 | 1.80 | 2 |" in text
    assert "| openvino bf16 | 250 | 200 | 80 % | 2 |" in text
    assert "| openvino bf16 | 2500 | 1600 | 0.20 | 0.30 | 900 | 900 | 0.999999 |" in text
    assert "were lost" not in text
    (result,) = report.scaling
    assert result.callers is not None
    queue = dataclasses.replace(result.callers.queue, answered=899)
    lost = dataclasses.replace(result, callers=dataclasses.replace(result.callers, queue=queue))
    assert "899 **: some were lost**" in render_markdown(dataclasses.replace(report, scaling=(lost,)), {})


def test_a_point_that_is_half_done_keeps_what_it_has(report):
    (result,) = report.scaling
    half = dataclasses.replace(result, cores=(), callers=None)
    left = dataclasses.replace(report, scaling=(half,), finished=("scaling openvino bf16, 1,000 texts",))
    assert restore(left).scaling == {"openvino bf16": half}
    assert not restore(left).has("scaling")


def test_slower_callers_are_caught_and_a_single_sample_is_not_judged(report):
    (result,) = report.scaling
    assert result.callers is not None
    slow = dataclasses.replace(result.callers, callers_samples_s=(0.9, 0.95))
    longer = dataclasses.replace(result.sizes[1], samples_s=(12.0,))
    slower = dataclasses.replace(result, callers=slow, sizes=(result.sizes[0], longer))
    changes = compare([report], [dataclasses.replace(report, scaling=(slower,))], threshold=0.07)
    found = {change.metric: change.verdict for change in changes if change.metric.startswith("scaling")}
    assert found == {
        "scaling, openvino bf16, 1000 texts": Verdict.SAME,
        "scaling, openvino bf16, 16000 texts": Verdict.NOISY,
        "scaling, openvino bf16, 1 cores": Verdict.SAME,
        "scaling, openvino bf16, 2 cores": Verdict.SAME,
        "scaling, openvino bf16, 100 callers": Verdict.WORSE,
    }
