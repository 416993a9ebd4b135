"""The benchmark's check of itself: the planted slowdown, and which outcome of a comparison is right."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

import benchmarks.run
from benchmarks import self_check
from benchmarks.self_check import main
from mirror_runtime import Encoder
from mirror_runtime.engines.fake import FakeEngine


def test_the_slowdown_is_planted_in_the_time_of_what_run_loads_and_nowhere_else(bundle, monkeypatch):
    seen = []

    def run(arguments):
        with Encoder.load(bundle, engine="fake") as encoder:
            began = time.perf_counter()
            vectors = encoder.encode(["a text"])
            seen.append((arguments, time.perf_counter() - began, vectors.tolist()))
        return 5

    compute = FakeEngine.run
    monkeypatch.setattr(FakeEngine, "run", lambda *of: time.sleep(0.04) or compute(*of))
    monkeypatch.setattr(benchmarks.run, "main", run)
    assert main(["planted", "1.5", "BUNDLE", "--quick"]) == 5
    assert run([]) == 5
    (arguments, slowed_s, vectors), (_, plain_s, same) = seen
    assert arguments == ["BUNDLE", "--quick"]
    assert slowed_s >= 0.1 > plain_s
    assert vectors == same


@pytest.fixture
def slower(report, change):
    """The report with a throughput 1.6 times as low."""

    def slow(one):
        slower = tuple(rate / 1.6 for rate in one.samples)
        return dataclasses.replace(one, samples=slower) if one.suite == "throughput" else one

    return change(report, "texts per second", slow)


@pytest.mark.parametrize(
    ("slow", "status", "lines"),
    [
        ("planted", 0, ["right: same-1: no alarm", "right: slower: throughput, openvino bf16"]),
        ("never", 1, ["right: same-1: no alarm", "WRONG: slower: no alarm"]),
        ("head", 1, ["WRONG: same-1: throughput", "right: slower: throughput"]),
    ],
)
def test_an_alarm_is_right_only_where_something_was_planted(
    bundle, report, slower, save, tmp_path, monkeypatch, capsys, slow, status, lines
):
    calls = []

    def run_to_end(command, _name):
        folder, script = Path(command[-1]), Path(command[1]).name
        save(slower if slow in (*command, folder.name[:-2]) else report, folder)
        calls.append((script, str(folder.relative_to(output))))

    monkeypatch.setattr(self_check, "run_to_end", run_to_end)
    output = tmp_path / "out"
    arguments = [str(bundle), "--engine", "fake", "--precision", "fp32", "--output", str(output)]
    assert main([*arguments, "--pairs", "1", "--runs", "2"]) == status
    sides = [f"{side}-{number}" for number in (1, 2) for side in ("base", "head")]
    scripts = ["run.py"] * 5 + ["self_check.py", "run.py", "self_check.py"]
    folders = [f"{title}/{side}" for title in ("same-1", "slower") for side in sides]
    assert calls == list(zip(scripts, folders, strict=True))
    captured = capsys.readouterr()
    for line, start in zip(captured.err.splitlines(), lines, strict=True):
        assert line.startswith(start)
    found = json.loads(captured.out)
    assert (found["right"], found["of"]) == (2 - status, 2)
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
