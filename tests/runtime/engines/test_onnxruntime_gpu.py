"""ONNX Runtime's GPU engine: its options, its errors, and its array binding, run with the CPU provider."""

import types
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from mirror_runtime.bundle import EncoderSpec, EngineName, Precision, read_manifest
from mirror_runtime.engines import installed, load_engine, onnxruntime_gpu
from mirror_runtime.engines.onnxruntime_gpu import PROVIDERS, OnnxRuntimeGpuEngine, tensorrt_options
from mirror_runtime.errors import EngineError
from mirror_runtime.packing import PackedRows, ShapeSet, pack
from tests.support.graphs import graph_of

CUDA, TENSORRT = EngineName.ONNXRUNTIME_CUDA, EngineName.ONNXRUNTIME_TENSORRT
DOCUMENTED = {
    *("device_id", "trt_max_workspace_size", "trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"),
    *("trt_engine_cache_enable", "trt_engine_cache_path", "trt_engine_cache_prefix"),
    *("trt_timing_cache_enable", "trt_timing_cache_path", "trt_builder_optimization_level", "trt_cuda_graph_enable"),
    *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes", "trt_layer_norm_fp32_fallback"),
}
"""Options of the TensorRT provider in ONNX Runtime's documentation; the 1.31.1 GPU wheel contains these strings."""


@pytest.fixture(scope="module")
def packed(tiny_bundle: Path) -> tuple[Path, EncoderSpec]:
    return graph_of(tiny_bundle).path, read_manifest(tiny_bundle).encoder


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the same code with the CPU provider instead of the GPU ones."""
    cpu: dict[str, Any] = {"name": "CPUExecutionProvider", "device": "cpu", "options": lambda *_: {}}
    changed = {name: replace(provider, **cpu) for name, provider in PROVIDERS.items()}
    monkeypatch.setattr(onnxruntime_gpu, "PROVIDERS", changed)


def batches() -> list[PackedRows]:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 60, 40)
    ids = random.integers(5, 60, int(lengths.sum()))
    return [batch.rows for batch in pack(ids, lengths, ShapeSet.up_to(64, budget=256))]


def compare(packed: tuple[Path, EncoderSpec], name: EngineName, atol: float) -> None:
    """Check an engine's vectors against those of the plain session, each batch twice."""
    graph, spec = packed
    engine = load_engine(name, Precision.FP32, graph, spec=spec)
    plain = load_engine(EngineName.ONNXRUNTIME, Precision.FP32, graph, spec=spec)
    rows = batches()
    assert len({batch.shape for batch in rows}) > 1
    kept = [(engine.run(batch), plain.run(batch)) for batch in (*rows, *reversed(rows))]
    # Compared after all runs: a result that is a view of the engine's memory would have changed by now.
    for found, expected in kept:
        np.testing.assert_allclose(found, expected, atol=atol)
    engine.close()


@pytest.mark.parametrize("name", [CUDA, TENSORRT])
def test_bound_arrays_give_the_vectors_of_the_plain_session(on_the_cpu, packed, name):
    compare(packed, name, atol=1e-6)


def test_a_provider_that_is_not_in_the_package_is_refused_with_the_cure(packed: tuple[Path, EncoderSpec]):
    if PROVIDERS[CUDA].name in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed here: its providers are in the package")
    graph, spec = packed
    with pytest.raises(EngineError, match=r"no CUDAExecutionProvider .*the extra gpu"):
        load_engine(CUDA, Precision.FP32, graph, spec=spec)
    with pytest.raises(EngineError, match=r"no TensorrtExecutionProvider .*TensorRT 10 .*engine tensorrt"):
        load_engine(TENSORRT, Precision.FP16, graph, spec=spec)
    with pytest.raises(EngineError, match="choose engine tensorrt"):
        OnnxRuntimeGpuEngine(CUDA, graph, Precision.FP8, None, None)
    assert not installed(CUDA)


def test_a_provider_that_onnxruntime_drops_is_an_error_and_no_fallback(monkeypatch, packed):
    """Without libnvinfer.so.10, ONNX Runtime warns and opens a session on another provider."""

    class Dropped(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, options: Any, providers: Any) -> None:
            assert [name for name, _ in providers] == ["TensorrtExecutionProvider"]
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    fake = types.SimpleNamespace(
        **{name: getattr(onnxruntime, name) for name in ("SessionOptions", "OrtValue")},
        InferenceSession=Dropped,
        get_available_providers=lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(onnxruntime_gpu, "require", lambda module, extra: fake)
    graph, spec = packed
    engine = load_engine(TENSORRT, Precision.FP16, graph, spec=spec)
    with pytest.raises(EngineError, match=r"not be loaded \(CPUExecutionProvider would run instead\).*TensorRT 10"):
        engine.run(batches()[0])


@pytest.mark.parametrize(
    ("precision", "flag"),
    [
        (Precision.FP32, None),
        (Precision.FP16, "trt_fp16_enable"),
        (Precision.BF16, "trt_bf16_enable"),
        (Precision.INT8, "trt_int8_enable"),
    ],
)
def test_the_tensorrt_provider_gets_one_static_profile_and_its_cache(precision: Precision, flag: str | None):
    options = tensorrt_options((4, 64), precision, Path("onnx/model_packed.onnx"), Path("cache"))
    assert set(options) <= DOCUMENTED
    shapes = "input_ids:4x64,position_ids:4x64,segment_ids:4x64"
    assert {options[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")} == {shapes}
    assert options["trt_engine_cache_prefix"] == "model_packed-4x64"
    assert options["trt_engine_cache_path"] == str(Path("cache/onnxruntime-tensorrt"))
    assert options["trt_cuda_graph_enable"] == "1"
    assert {key for key in options if key.split("_")[1] in ("fp16", "bf16", "int8")} == ({flag} if flag else set())
    without_cache = tensorrt_options((1, 16), precision, Path("model_packed.onnx"), None)
    assert not [key for key in without_cache if "cache" in key]


def test_a_static_session_computes_nothing_about_shapes(packed: tuple[Path, EncoderSpec], tmp_path: Path):
    """Shape arithmetic runs on the CPU and cannot be captured in a CUDA graph. With both sizes fixed, none is left."""
    graph, _ = packed
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("rows", 4)
    options.add_free_dimension_override_by_name("length", 64)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "static.onnx")
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "static.onnx").graph.node}
    assert "MatMul" in left
    assert not left & {"Shape", "Range", "ConstantOfShape", "Size", "NonZero"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [CUDA, TENSORRT])
def test_a_real_gpu_gives_the_vectors_of_the_cpu(packed: tuple[Path, EncoderSpec], name: EngineName):
    if PROVIDERS[name].name not in onnxruntime.get_available_providers():
        pytest.skip(f"needs an NVIDIA GPU and onnxruntime-gpu with {PROVIDERS[name].name}")
    if name is TENSORRT and not version("tensorrt").startswith("10."):  # as `make setup GPU=1` has it
        with pytest.raises(EngineError, match="needs TensorRT 10"):
            compare(packed, name, atol=2e-3)
        return
    compare(packed, name, atol=2e-3)
