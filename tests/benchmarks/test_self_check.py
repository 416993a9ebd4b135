"""The benchmark's check of itself: the planted slowdown, and which outcome of a comparison is right."""

import dataclasses
import json
import time

import numpy as np
import pytest

import benchmarks.run
from benchmarks import self_check
from benchmarks.self_check import judge, main
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Pooling, Precision, read_manifest
from mirror_runtime.engines.fake import FakeEngine
from mirror_runtime.errors import EngineError
from mirror_runtime.packing import PackedRows


class Timed(FakeEngine):
    """Takes 40 ms."""

    def run(self, rows):
        time.sleep(0.04)
        return super().run(rows)


def test_the_slowdown_is_planted_in_the_time_of_what_run_loads_and_nowhere_else(bundle, monkeypatch):
    engine, slowed = (Timed(Precision.FP32, 2, read_manifest(bundle).encoder) for _ in range(2))
    self_check.slow_down(slowed, 0.5)
    ids = np.ones((1, 16), np.int64)
    rows = PackedRows(input_ids=ids, position_ids=np.arange(16)[None, :], segment_ids=ids)
    began = time.perf_counter()
    vectors = slowed.run(rows)
    assert time.perf_counter() - began >= 0.06
    np.testing.assert_array_equal(vectors, engine.run(rows))

    def run(arguments):
        with Encoder.load(bundle, engine="fake") as encoder:
            seen.append((arguments, "run" in vars(encoder.engine)))
        return 5

    seen: list[object] = []
    monkeypatch.setattr(benchmarks.run, "main", run)
    assert main(["planted", "0.15", "BUNDLE", "--quick"]) == 5
    assert run([]) == 5
    assert seen == [(["BUNDLE", "--quick"], True), ([], False)]


@pytest.fixture
def slower(report, change):
    """The report with a throughput 1.6 times as low."""

    def slow(one):
        slower = tuple(rate / 1.6 for rate in one.samples)
        return dataclasses.replace(one, samples=slower) if one.suite == "throughput" else one

    return change(report, "texts per second", slow)


def test_an_alarm_is_right_only_where_something_was_planted(report, slower, capsys):
    assert judge("same", [report], [report], expected=False)["right"]
    assert not judge("missed", [report], [report], expected=True)["right"]
    assert not judge("cried", [report], [slower], expected=False)["right"]
    caught = judge("caught", [report], [slower], expected=True)
    (alarm,) = caught["alarms"]
    assert caught["right"]
    assert alarm.startswith("throughput, openvino bf16")
    assert "(1.600)" in alarm
    err = capsys.readouterr().err
    assert "WRONG: missed: no alarm" in err
    assert f"right: caught: {alarm}" in err


def test_sides_are_interleaved_and_only_the_head_is_slowed(bundle, report, slower, save, tmp_path, monkeypatch, capsys):
    calls = []

    def call(script, *arguments):
        planted = arguments[0] == "planted"
        if script == "export/to_onnx.py":
            arguments[2].mkdir()
        else:
            broken = planted or (arguments[-1].name == "head" and "pooling" in str(arguments[-1]))
            save(slower if broken else report, arguments[-1])
            calls.append((script, arguments[1] if planted else "", str(arguments[-1].relative_to(output))))

    monkeypatch.setattr(self_check, "call", call)
    output = tmp_path / "out"
    arguments = [str(bundle), "--engine", "fake", "--precision", "fp32", "--sts", "absent.tsv", "--output", str(output)]
    assert main([*arguments, "--pairs", "1", "--runs", "2"]) == 0, capsys.readouterr().err
    assert calls == [
        *(("benchmarks/run.py", "", f"same-1/{side}-{number}") for number in (1, 2) for side in ("base", "head")),
        ("benchmarks/run.py", "", "slower/base-1"),
        ("benchmarks/self_check.py", "0.15", "slower/head-1"),
        ("benchmarks/run.py", "", "slower/base-2"),
        ("benchmarks/self_check.py", "0.15", "slower/head-2"),
        ("benchmarks/run.py", "", "pooling/base"),
        ("benchmarks/run.py", "", "pooling/head"),
    ]
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["right"], line["of"]) == (3, 3)
    assert not (output / "wrong-pooling-bundle").exists()
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.process
def test_a_failing_command_is_an_error():
    with pytest.raises(EngineError, match=r"absent\.py ended with status 2: .*No such file"):
        self_check.call("benchmarks/absent.py")


def test_a_bundle_with_cls_pooling_is_refused(bundle, monkeypatch, capsys):
    manifest = read_manifest(bundle)
    cls = dataclasses.replace(manifest.encoder, pooling=Pooling.CLS)
    monkeypatch.setattr(self_check, "read_manifest", lambda _: dataclasses.replace(manifest, encoder=cls))
    monkeypatch.setattr(self_check, "choose", lambda *_: (EngineName.FAKE, Precision.FP32, None))
    assert main([str(bundle), "--sts", "absent.tsv"]) == 2
    assert "use another bundle" in capsys.readouterr().err
