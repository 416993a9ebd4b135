import dataclasses
import re

import pytest

from mirror_runtime import EngineError
from mirror_runtime.bundle import EngineName, Layout, Precision, read_manifest
from mirror_runtime.plan import DecisionSource, decide
from mirror_runtime.selection import choose
from tests.support.fake_gpu import FakeDriver, install_driver

ORT32 = (EngineName.ONNXRUNTIME, Precision.FP32)
OV32 = (EngineName.OPENVINO, Precision.FP32)
OV16 = (EngineName.OPENVINO, Precision.BF16)


@pytest.fixture
def manifest(make_bundle, make_artifact):
    return read_manifest(make_bundle(artifacts=tuple(make_artifact(*pair) for pair in (ORT32, OV32, OV16))))


@pytest.mark.parametrize(
    ("bf16", "openvino", "onnxruntime", "chosen"),
    [(True, True, True, OV16), (False, True, True, ORT32), (True, False, True, ORT32), (False, True, False, OV32)],
)
def test_auto_follows_the_documented_rule(manifest, monkeypatch, bf16, openvino, onnxruntime, chosen):
    have = {EngineName.OPENVINO: openvino, EngineName.ONNXRUNTIME: onnxruntime}
    monkeypatch.setattr("mirror_runtime.selection.has_bf16", lambda: bf16)
    monkeypatch.setattr("mirror_runtime.selection.installed", have.__getitem__)
    *names, artifact = choose(manifest, "auto", "auto")
    assert artifact is not None
    assert tuple(names) == (artifact.engine, artifact.precision) == chosen


def test_what_was_asked_for_is_chosen_even_where_it_will_fail_and_nothing_installed_is_an_error(manifest, monkeypatch):
    monkeypatch.setattr("mirror_runtime.selection.has_bf16", lambda: False)
    assert choose(manifest, "openvino", "bf16")[:2] == OV16
    assert choose(manifest, "openvino", "auto")[:2] == OV32
    assert choose(manifest, "auto", "fp32")[:2] == ORT32
    monkeypatch.setattr("mirror_runtime.selection.installed", lambda name: False)
    with pytest.raises(EngineError, match=r"onnxruntime fp32: its engine is not installed, pip install .*\[cpu\]'"):
        choose(manifest, "auto", "auto")
    monkeypatch.setattr("mirror_runtime.selection.installed", lambda name: True)
    only_half = dataclasses.replace(manifest, artifacts=manifest.artifacts[2:])
    with pytest.raises(EngineError, match=r"nothing in the bundle runs here: openvino bf16: the CPU has no bf16"):
        choose(only_half, "auto", "auto")


def test_auto_never_takes_int8_or_padded_graphs_and_int8_is_there_for_the_asking(make_bundle, make_artifact):
    pairs = [(engine, Precision.INT8) for engine in (EngineName.ONNXRUNTIME, EngineName.OPENVINO)]
    manifest = read_manifest(make_bundle(artifacts=tuple(make_artifact(*pair) for pair in (*pairs, ORT32))))
    assert choose(manifest, "auto", "auto")[:2] == ORT32
    assert choose(manifest, "onnxruntime", "auto")[:2] == ORT32
    assert choose(manifest, "auto", "int8")[:2] == (EngineName.OPENVINO, Precision.INT8)
    alone = read_manifest(make_bundle(artifacts=(make_artifact(*pairs[0]),), name="alone"))
    with pytest.raises(EngineError, match=r"it has onnxruntime int8\. Choose one of these"):
        choose(alone, "auto", "auto")
    padded = read_manifest(make_bundle(artifacts=(make_artifact(*ORT32, Layout.PADDED),), name="padded"))
    with pytest.raises(EngineError, match="it has none"):
        choose(padded, "auto", "auto")


TRT16, CUDA16 = (EngineName.TENSORRT, Precision.FP16), (EngineName.ONNXRUNTIME_CUDA, Precision.FP16)
HERE = {"gpu": "NVIDIA L4 (8.9)", "tensorrt": "11.4.0.106"}


@pytest.mark.parametrize(
    ("driver", "proven", "installed", "chosen", "reported"),
    [
        (FakeDriver(), HERE, {TRT16[0], CUDA16[0]}, TRT16, ""),
        (FakeDriver(), HERE, {CUDA16[0]}, CUDA16, "tensorrt fp16 .* passed over: its engine is not installed"),
        (FakeDriver(), {"gpu": "NVIDIA A10 (8.6)"}, {TRT16[0]}, ORT32, "proven on NVIDIA A10 .* this is NVIDIA L4"),
        (FakeDriver(), {}, {TRT16[0]}, ORT32, "proven on an unnamed GPU"),
        (
            FakeDriver(),
            HERE | {"tensorrt": "10.16"},
            {TRT16[0]},
            ORT32,
            "of TensorRT 10.16, and 11.4.0.106 is installed",
        ),
        (None, HERE, {TRT16[0], CUDA16[0]}, ORT32, "onnxruntime-cuda fp16 .* no NVIDIA GPU was found"),
        (FakeDriver(100), HERE, {TRT16[0]}, ORT32, "tensorrt fp16 .* shows this process no GPU"),
    ],
)
def test_auto_prefers_what_was_proven_on_this_gpu(
    make_bundle, make_artifact, monkeypatch, caplog, driver, proven, installed, chosen, reported
):
    artifacts = (make_artifact(*ORT32), *(make_artifact(*pair, toolchain=proven) for pair in (CUDA16, TRT16)))
    manifest = read_manifest(make_bundle(artifacts=artifacts))
    install_driver(monkeypatch, driver)
    monkeypatch.setattr("mirror_runtime.selection.version", lambda package: HERE[package])
    monkeypatch.setattr("mirror_runtime.selection.installed", lambda name: name in (*installed, ORT32[0]))
    decision = decide(manifest, "auto", "auto", None)
    assert (decision.engine, decision.precision, decision.source) == (*chosen, DecisionSource.RULE)
    assert re.search(reported, caplog.text) if reported else not caplog.text
    assert decide(manifest, "onnxruntime-cuda", "auto", None).engine is CUDA16[0], "what is named is not passed over"
