"""The benchmark's own trial: what is planted is slower, and a verdict is right only where it should be."""

import dataclasses
import time

import numpy as np

from benchmarks.markdown import render_markdown
from benchmarks.planted import Slowed
from benchmarks.trust import judge, main
from mirror_runtime.bundle import EngineName, Precision, read_manifest
from mirror_runtime.engines.fake import FakeEngine
from mirror_runtime.packing import PackedRows


class Timed(FakeEngine):
    """Takes 40 ms, and says so."""

    def run(self, rows):
        time.sleep(0.04)
        return super().run(rows)


def test_a_planted_slowdown_is_in_the_time_and_not_in_the_vectors(make_bundle, make_artifact):
    spec = read_manifest(make_bundle(artifacts=(make_artifact(EngineName.FAKE, Precision.FP32),))).encoder
    engine = Timed(Precision.FP32, 2, spec)
    slowed = Slowed(engine, 0.5)
    ids = np.ones((1, 16), np.int64)
    rows = PackedRows(input_ids=ids, position_ids=np.arange(16)[None, :], segment_ids=ids)
    assert (slowed.name, slowed.precision, slowed.streams) == (engine.name, engine.precision, 2)
    began = time.perf_counter()
    vectors = slowed.run(rows)
    assert time.perf_counter() - began >= 0.06
    np.testing.assert_array_equal(vectors, engine.run(rows))


def test_a_report_with_a_planted_slowdown_says_so(report):
    planted = dataclasses.replace(report.settings, planted_slowdown=0.15)
    assert "took 15 % longer on purpose" in render_markdown(dataclasses.replace(report, settings=planted), {})
    assert "on purpose" not in render_markdown(report, {})


def test_an_alarm_is_right_only_where_something_was_planted(report, capsys):
    (rate,) = report.throughput
    slow = dataclasses.replace(rate, samples_s=(0.8, 0.81, 0.82))
    slower = dataclasses.replace(report, throughput=(slow,))
    assert judge("same", [report], [report], expected=False).right
    assert not judge("missed", [report], [report], expected=True).right
    assert not judge("cried", [report], [slower], expected=False).right
    caught = judge("caught", [report], [slower], expected=True)
    assert caught.right
    assert caught.alarms == ("throughput, openvino bf16 (1.620)",)
    err = capsys.readouterr().err
    assert "WRONG: missed: no alarm" in err
    assert "right: caught: throughput, openvino bf16" in err


def test_older_reports_are_not_mixed_in(make_bundle, make_artifact, tmp_path, capsys):
    bundle = make_bundle(artifacts=(make_artifact(EngineName.FAKE, Precision.FP32),))
    output = tmp_path / "out"
    output.mkdir()
    (output / "report").write_text("x")
    arguments = [str(bundle), "--engine", "fake", "--precision", "fp32", "--sts", "absent.tsv"]
    assert main([*arguments, "--output", str(output)]) == 2
    assert "is not empty" in capsys.readouterr().err
