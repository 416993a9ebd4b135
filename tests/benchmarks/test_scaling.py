"""Suite scaling: distinct texts, and fresh processes on fewer cores."""

import os

import pytest

from benchmarks.suites import scaling
from benchmarks.suites.scaling import _run, cores_to_try
from benchmarks.suites.scaling_process import NUMBERS, distinct
from mirror_runtime.errors import EngineError


def test_no_text_comes_twice_and_sizes_have_numbers_of_the_same_kind():
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


@pytest.mark.process
def test_a_process_runs_on_so_many_cores_and_a_failure_is_named_by_its_last_line(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, os; print(json.dumps(sorted(os.sched_getaffinity(0))))")
    monkeypatch.setattr(scaling, "SCRIPT", script)
    mine = sorted(os.sched_getaffinity(0))
    assert _run({"what": "cores", "count": 1}) == mine[:1]
    assert _run({"what": "texts", "count": 1}) == mine
    script.write_text("raise KeyError('what')")
    with pytest.raises(EngineError, match="its process ended with status 1: KeyError: 'what'"):
        _run({"what": "texts", "count": 1})
