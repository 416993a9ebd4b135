"""A continued run takes over what was complete, measures the rest anew, and refuses another run's report."""

import dataclasses

import pytest

from benchmarks.report import build_report
from benchmarks.results import Failure
from benchmarks.resume import read_interrupted, restore
from benchmarks.serving_results import GATEWAY
from benchmarks.session import Plan, Results, select_points
from benchmarks.workload import bundle_tokenizer, load_workload
from mirror_runtime.bundle import TOKENIZER_FILE, EngineName, Precision, read_manifest
from mirror_runtime.errors import InputError


@pytest.fixture
def plan(make_bundle, make_artifact, tmp_path) -> Plan:
    bundle = make_bundle(artifacts=(make_artifact(EngineName.FAKE, Precision.FP32),))
    manifest = read_manifest(bundle)
    texts = tmp_path / "texts.txt"
    texts.write_text("one text\n", encoding="utf-8")
    tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, manifest.encoder.max_tokens)
    return Plan(
        bundle=bundle, manifest=manifest, points=select_points(manifest, (), ()),
        workload=load_workload(texts, tokenizer, quick=False, seed=0), suites=(), peers=(), sets=(), training=None,
        quick=True, rounds=2, seed=0, flop_per_token=None,
    )  # fmt: skip


@pytest.fixture
def interrupted(plan, report, save, tmp_path):
    """Write what a run leaves that was interrupted before anything was measured."""
    about = {"host": report.host, "versions": report.versions, "source": report.source}
    left = build_report(plan, Results(), **about, started=report.started, resumed=(), wall_s=3.0, partial=True)
    save(left, tmp_path / "out")
    return left, about


def test_the_same_run_goes_on(plan, interrupted, tmp_path):
    left, about = interrupted
    assert read_interrupted(tmp_path / "out", plan, **about) == left


def test_another_run_is_refused_by_what_differs(plan, interrupted, tmp_path):
    _, about = interrupted
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"the settings of the interrupted run .* seed=0"):
        read_interrupted(out, dataclasses.replace(plan, seed=1), **about)
    host = dataclasses.replace(about["host"], cpu_model="another")
    with pytest.raises(InputError, match="the machine of"):
        read_interrupted(out, plan, **{**about, "host": host})
    with pytest.raises(InputError, match="the versions of"):
        read_interrupted(out, plan, **{**about, "versions": {"openvino": "2027.1"}})
    with pytest.raises(InputError, match="the commit of"):
        read_interrupted(out, plan, **{**about, "source": dataclasses.replace(about["source"], commit="0" * 40)})
    info = dataclasses.replace(plan.workload.info, texts_sha256="1" * 64)
    other = dataclasses.replace(plan, workload=dataclasses.replace(plan.workload, info=info))
    with pytest.raises(InputError, match="the workload of"):
        read_interrupted(out, other, **about)


def test_a_complete_report_or_none_cannot_go_on(plan, interrupted, save, tmp_path):
    left, about = interrupted
    save(dataclasses.replace(left, partial=False), tmp_path / "out")
    with pytest.raises(InputError, match="is complete"):
        read_interrupted(tmp_path / "out", plan, **about)
    with pytest.raises(InputError, match=r"--resume: .*absent"):
        read_interrupted(tmp_path / "absent", plan, **about)


def test_complete_steps_are_taken_over_and_half_done_ones_are_not(report):
    everything = restore(report)
    assert list(everything.throughput) == ["openvino bf16"]
    assert list(everything.peers) == ["st torch"]
    assert list(everything.quality) == ["st torch"]  # ours are judged anew, which peers' deltas need
    assert everything.serving == {}  # "serving openvino bf16" is not among the finished
    assert everything.failures == list(report.failures)
    nothing = restore(dataclasses.replace(report, finished=()))
    assert not nothing.throughput
    assert not nothing.latency
    assert not nothing.peers
    assert not nothing.failures
    assert list(nothing.training) == [result.party for result in report.training]  # each run counts by itself
    served = restore(dataclasses.replace(report, finished=("serving openvino bf16",)))
    assert list(served.serving) == ["openvino bf16"]
    assert not served.has("serving")
    gateway = dataclasses.replace(report.serving[0], protocol=GATEWAY)
    both = dataclasses.replace(report, serving=(*report.serving, gateway), finished=("serving openvino bf16",))
    assert list(restore(both).serving) == ["openvino bf16"]  # the same artifact's gateway is a step of its own
    finished = (*both.finished, "serving openvino bf16, http, gateway")
    assert restore(dataclasses.replace(both, finished=finished)).serving["openvino bf16, http, gateway"] == gateway


def test_a_failure_of_an_unfinished_step_is_forgotten(report):
    failures = (
        Failure(suite="serving", party="openvino bf16", reason="a"),
        Failure(suite="load", party="tensorrt fp16", reason="b"),
    )
    left = dataclasses.replace(report, failures=failures, finished=("serving openvino bf16",))
    assert restore(left).failures == [failures[0]]
