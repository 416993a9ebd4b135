"""The build of a TensorRT plan, against the real bindings of TensorRT 10 and 11: order of calls, names, arguments."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from export.tensorrt import builder, prove_plan
from export.tensorrt.artifact import packed_profiles, padded_profiles
from export.tensorrt.builder import BuildError, BuildRequest, build, read_request, trtexec_line
from mirror_runtime import gpu
from mirror_runtime.bundle import TensorSpec
from mirror_runtime.engines import cuda_device, plan_card, tensorrt_engine
from mirror_runtime.engines.plan_card import read_card
from mirror_runtime.errors import EngineError
from mirror_runtime.packing import ShapeSet
from mirror_runtime.vectors import cosines
from tests.support import fake_gpu
from tests.support.fake_gpu import install_tensorrt
from tests.support.tensorrt_binding import VERSIONS, FakeTensorRT, binding

GPU = ("NVIDIA L4", "8.9")
INPUTS = tuple(
    TensorSpec(name=name, dtype="int64", shape=("rows", "length"))
    for name in ("input_ids", "position_ids", "segment_ids")
)
SOURCES = tuple(Path(str(module.__file__)) for module in (builder, prove_plan, tensorrt_engine, plan_card, cuda_device))


def members(version: str, kind: str) -> set[str]:
    spec = binding(version)
    return set(spec["enums"].get(kind, ())) | set(spec["classes"].get(kind, {"members": ()})["members"])


def chains(source: str) -> Iterator[tuple[str, ...]]:
    """Every `trt.A.B` and `self._trt.A.B` of a source, as ("A", "B")."""
    inner: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or node in inner:
            continue
        names, value = [node.attr], node.value
        while isinstance(value, ast.Attribute) and value.attr != "_trt":
            inner.add(value)
            names.append(value.attr)
            value = value.value
        root = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
        if root in ("trt", "_trt"):
            yield tuple(reversed(names))


def missing(source: str, version: str) -> list[str]:
    """Names that a source takes from `tensorrt` and that the binding of a version does not have."""
    spec = binding(version)
    plain = {*spec["constants"], "__version__", "nptype"}
    absent = []
    for first, *rest in chains(source):
        known = first in plain or first in spec["classes"] or first in spec["enums"]
        if known and rest and first not in plain:
            severity = set(spec["enums"].get(f"{first}.Severity", ()))
            known = rest[0] in members(version, first) | severity
        if not known:
            absent.append(".".join((first, *rest)))
    return absent


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_our_sources_take_from_tensorrt_is_in_the_real_binding(version):
    used = [chain for source in SOURCES for chain in chains(source.read_text(encoding="utf-8"))]
    assert ("BuilderFlag", "TF32") in used
    assert ("ExecutionContextAllocationStrategy", "USER_MANAGED") in used
    assert len(used) > 25
    for source in SOURCES:
        assert missing(source.read_text(encoding="utf-8"), version) == [], source.name
    assert set(builder.HARDWARE.values()) == members(version, "HardwareCompatibilityLevel")
    removed = {"10": [], "11": ["BuilderFlag.FP16"]}
    assert missing("trt.BuilderFlag.FP16", version) == removed[version[:2]]


def test_no_source_uses_a_member_that_11_removed():
    ten, eleven = (
        set().union(*({*spec["members"]} for spec in binding(version)["classes"].values())) for version in VERSIONS
    )
    assert {"int8_calibrator", "platform_has_fast_fp16", "device_memory_size", "supports_model"} <= ten - eleven
    removed = ten - eleven - {"precision"}  # also a field of our requests
    for source in SOURCES:
        tree = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        assert not {node.attr for node in tree if isinstance(node, ast.Attribute)} & removed, source.name


def request_in(folder: Path, **changes: Any) -> BuildRequest:
    (folder / "model_packed.onnx").write_bytes(b"graph")
    profiles = packed_profiles(INPUTS, ShapeSet.up_to(64).shapes())
    digest = builder._sha256(b"graph")
    request = BuildRequest("model_packed.onnx", digest, "model_packed.plan", "fp16", "packed", profiles)
    return replace(request, **changes)


def fake(monkeypatch: pytest.MonkeyPatch, version: str = VERSIONS[1], **changes: Any) -> FakeTensorRT:
    trt = install_tensorrt(monkeypatch, version)
    layers = ('{"Name": "_gemm_mha_v2"}', '{"Name": "head"}')
    inspected = {"EngineInspector.get_layer_information": lambda i, form: layers[i], "ICudaEngine.num_layers": 2}
    trt.answers |= inspected | changes
    monkeypatch.setattr(builder, "this_gpu", lambda: GPU)
    return trt


@pytest.mark.parametrize("version", VERSIONS)
def test_a_build_calls_both_majors_in_the_documented_order(monkeypatch, tmp_path, version):
    request = request_in(tmp_path, workspace_gib=2.0, level=4, timing_cache="timing.cache")
    trt = fake(monkeypatch, version)
    build(request, tmp_path)
    called = trt.names()
    order = [
        *("Logger()", "Builder()", "Builder.create_network", "OnnxParser()", "OnnxParser.parse_from_file"),
        *("Builder.create_builder_config", "IBuilderConfig.clear_flag", "IBuilderConfig.set_memory_pool_limit"),
        *("Builder.create_optimization_profile", "IOptimizationProfile.set_shape"),
        *("IBuilderConfig.add_optimization_profile", "IBuilderConfig.create_timing_cache"),
        *("IBuilderConfig.set_timing_cache", "Builder.is_network_supported", "Builder.build_serialized_network"),
        *("Runtime()", "Runtime.deserialize_cuda_engine", "ICudaEngine.create_engine_inspector"),
        "EngineInspector.get_layer_information",
    ]
    assert [name for name in dict.fromkeys(called) if name in order] == order
    calls = dict(trt.calls)
    strongly_typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert calls["Builder.create_network"] == (1 << int(strongly_typed),)  # bit 1 in TensorRT 10, bit 0 in 11
    assert calls["IBuilderConfig.clear_flag"] == (trt.BuilderFlag.TF32,)
    assert calls["IBuilderConfig.builder_optimization_level="] == (4,)
    assert calls["IBuilderConfig.set_memory_pool_limit"] == (trt.MemoryPoolType.WORKSPACE, 2 << 30)
    assert calls["IBuilderConfig.set_timing_cache"][1] is False
    assert "IBuilderConfig.set_flag" not in called
    assert "IBuilderConfig.hardware_compatibility_level=" not in called
    shapes = [args for name, args in trt.calls if name == "IOptimizationProfile.set_shape"]
    assert shapes[0] == ("input_ids", (1, 16), (1, 16), (1, 16))
    assert len(shapes) == 3 * len(request.profiles)


@pytest.mark.parametrize("version", VERSIONS)
def test_compatibility_options_reach_the_config(monkeypatch, tmp_path, version):
    request = request_in(tmp_path, version_compatible=True, hardware="same-compute-capability")
    trt = fake(monkeypatch, version)
    build(request, tmp_path)
    calls = dict(trt.calls)
    assert calls["IBuilderConfig.set_flag"] == (trt.BuilderFlag.VERSION_COMPATIBLE,)
    level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert calls["IBuilderConfig.hardware_compatibility_level="] == (level,)


def test_a_plan_comes_with_a_card_that_the_runtime_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    request = request_in(tmp_path, timing_cache="timing.cache")
    fake(monkeypatch)
    build(request, tmp_path, prove=lambda trt, engine: (0.99995, 0.9999))
    assert (tmp_path / "model_packed.plan").read_bytes() == b"plan"
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"
    assert json.loads((tmp_path / "model_packed.plan.layers.json").read_text())[1] == '{"Name": "head"}'
    card = read_card(tmp_path / "model_packed.plan")
    assert (card.tensorrt, card.gpu, card.compute_capability) == (VERSIONS[1], "NVIDIA L4", "8.9")
    assert (card.precision.value, card.layout.value, card.onnx_sha256) == ("fp16", "packed", request.onnx_sha256)
    assert (card.layers, card.fused_attention, card.min_cosine) == (2, 1, 0.99995)
    assert [profile["input_ids"][2] for profile in card.profiles] == list(ShapeSet.up_to(64).shapes())
    assert [(t.name, t.dtype, t.shape) for t in card.outputs] == [("embedding", "float32", (-1, -1, 8))]
    again = fake(monkeypatch)
    build(request, tmp_path)
    assert dict(again.calls)["IBuilderConfig.create_timing_cache"] == (b"timings",), "read before it is extended"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"OnnxParser.parse_from_file": False, "OnnxParser.num_errors": 1, "ParserError.node_name": "add_7"}, "add_7"),
        ({"IBuilderConfig.add_optimization_profile": -1}, "refuses profile 0"),
        ({"IBuilderConfig.set_timing_cache": False}, "timing cache of another GPU"),
        ({"Builder.is_network_supported": False}, "cannot build"),
        ({"Builder.build_serialized_network": None}, "failed to build an engine"),
        ({"Runtime.deserialize_cuda_engine": None}, "cannot load the engine"),
        ({"ICudaEngine.num_optimization_profiles": 1}, "has 1 profiles"),
    ],
)
def test_a_failure_of_tensorrt_is_one_clear_error_and_leaves_no_file(monkeypatch, tmp_path, changes, message):
    request = request_in(tmp_path, timing_cache="timing.cache")
    fake(monkeypatch, **changes)
    with pytest.raises(BuildError, match=message):
        build(request, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model_packed.onnx"]


@pytest.mark.parametrize("worst", [0.99, float("nan")])
def test_a_plan_whose_vectors_are_not_the_references_is_not_kept(monkeypatch, tmp_path, worst):
    request = request_in(tmp_path)
    fake(monkeypatch)
    with pytest.raises(BuildError, match=r"below 0\.9999"):
        build(request, tmp_path, prove=lambda trt, engine: (worst, 0.9999))
    assert [path.name for path in tmp_path.iterdir()] == ["model_packed.onnx"]


def test_a_request_that_does_not_fit_is_refused(monkeypatch, tmp_path):
    for changes in ({"level": 6}, {"hardware": "all"}, {"workspace_gib": 0.0}):
        with pytest.raises(BuildError, match=next(iter(changes))):
            request_in(tmp_path, **changes)
    trt = fake(monkeypatch)
    with pytest.raises(BuildError, match="the network's inputs are input_ids, position_ids, segment_ids"):
        build(request_in(tmp_path, profiles=packed_profiles(INPUTS[:2], ShapeSet.up_to(64).shapes())), tmp_path)
    trt.__version__ = "8.6.1"
    with pytest.raises(BuildError, match="too old"):
        build(request_in(tmp_path), tmp_path)
    request = request_in(tmp_path)
    (tmp_path / "model_packed.onnx").write_bytes(b"other")
    with pytest.raises(BuildError, match="copy it again"):
        build(request, tmp_path)


def test_a_request_survives_the_way_to_another_machine(tmp_path: Path):
    request = request_in(tmp_path, workspace_gib=1.5)
    builder.write_request(request, tmp_path / "request.json")
    assert read_request(tmp_path / "request.json") == request
    (tmp_path / "request.json").write_text("{}")
    with pytest.raises(BuildError, match="not a build request"):
        read_request(tmp_path / "request.json")


@pytest.mark.process
def test_the_copied_script_runs_alone_and_says_what_is_missing(tmp_path: Path):
    """`-S` and `-I`: without our packages, without this repository and without tensorrt."""
    builder.write_request(request_in(tmp_path), tmp_path / "request.json")
    script = tmp_path / "build_engine.py"
    script.write_bytes(Path(builder.__file__).read_bytes())
    done = subprocess.run([sys.executable, "-I", "-S", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: tensorrt cannot be imported")
    assert not (tmp_path / "model_packed.plan.json").exists()


def test_trtexec_gets_the_same_build(tmp_path: Path):
    profiles = packed_profiles(INPUTS, ShapeSet.up_to(64).shapes())[:2]
    options = {"workspace_gib": 2.0, "version_compatible": True, "hardware": "ampere-plus"}
    assert trtexec_line(request_in(tmp_path, profiles=profiles, **options)) == (
        "trtexec --onnx=model_packed.onnx --saveEngine=model_packed.plan --stronglyTyped"
        " --profile=0 --minShapes=input_ids:1x16,position_ids:1x16,segment_ids:1x16"
        " --optShapes=input_ids:1x16,position_ids:1x16,segment_ids:1x16"
        " --maxShapes=input_ids:1x16,position_ids:1x16,segment_ids:1x16"
        " --profile=1 --minShapes=input_ids:1x32,position_ids:1x32,segment_ids:1x32"
        " --optShapes=input_ids:1x32,position_ids:1x32,segment_ids:1x32"
        " --maxShapes=input_ids:1x32,position_ids:1x32,segment_ids:1x32"
        " --builderOptimizationLevel=3 --profilingVerbosity=detailed --noTF32 --memPoolSize=workspace:2048M"
        " --versionCompatible --hardwareCompatibilityLevel=ampere+"
    )


def test_packed_profiles_are_static_and_cover_every_shape_that_packing_makes():
    shapes = ShapeSet.up_to(384).shapes()
    names = [tensor.name for tensor in INPUTS]
    assert packed_profiles(INPUTS, shapes) == tuple(dict.fromkeys(names, (shape,) * 3) for shape in shapes)


def test_padded_profiles_hold_every_length_once():
    inputs = (TensorSpec(name="input_ids", dtype="int64", shape=("b", "s")),)
    profiles = padded_profiles(inputs, 200)
    shapes = [profile["input_ids"] for profile in profiles]
    assert [n for least, _, most in shapes for n in range(least[1], most[1] + 1)] == list(range(1, 201))
    assert all(low <= usual <= high for bounds in shapes for low, usual, high in zip(*bounds, strict=True))


class FakeDriver:
    """GPU memory in a dictionary; running the engine copies the answer into its output."""

    stream = 7

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}

    def put(self, array: np.ndarray) -> int:
        self.memory[256 * (len(self.memory) + 1)] = array.copy()
        return 256 * len(self.memory)

    def get(self, address: int, array: np.ndarray) -> None:
        array[...] = self.memory[address]

    def free(self, address: int) -> None:
        assert address in self.memory


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_short_proof_finds_the_worst_of_all_stored_texts(monkeypatch, tmp_path, version, noise):
    """Two batches of two texts; the engine is off by `noise` in the second text of the first."""
    vectors = np.random.default_rng(0).normal(size=(2, 2, 8)).astype(np.float32)
    outs = np.zeros((2, 1, 4, 8), np.float32)
    outs[:, 0, :2] = vectors
    outs[0, 0, 1] += noise
    stored: dict[str, Any] = {"batches": 2, "floor": 0.9999, "output": "embedding"}
    for batch in range(2):
        stored |= {f"{batch}/input/{tensor.name}": np.ones((1, 16), np.int64) for tensor in INPUTS}
        stored |= {f"{batch}/slots": np.array([0, 1]), f"{batch}/vectors": vectors[batch]}
    np.savez(tmp_path / "samples.npz", **stored)
    driver, pending = FakeDriver(), iter(outs)
    addresses: dict[str, int] = {}

    def run(stream: int) -> bool:
        driver.memory[addresses["embedding"]] = next(pending)
        return stream == 7

    changes = {
        "ICudaEngine.num_optimization_profiles": 1,
        "ICudaEngine.get_tensor_profile_shape": lambda name, i: [(1, 16)] * 3,
        "IExecutionContext.get_tensor_shape": lambda name: (1, 4, 8) if name == "embedding" else (1, 16),
        "IExecutionContext.set_tensor_address": lambda name, address: addresses.update({name: address}) or True,
        "IExecutionContext.execute_async_v3": run,
    }
    trt = fake(monkeypatch, version, **changes)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"plan")
    worst, floor = prove_plan.prove(trt, engine, tmp_path / "samples.npz", driver)
    found, wanted = outs[0, 0, 1], vectors[0, 1]
    (expected,) = cosines(found[None], wanted[None])
    assert worst == pytest.approx(expected, abs=1e-6)
    assert floor == 0.9999
    assert (worst >= floor) == (noise == 0.0)


def test_the_stand_in_refuses_what_the_binding_refuses():
    trt = FakeTensorRT(binding(VERSIONS[1]))
    logger = trt.Logger(trt.Logger.WARNING)
    config = trt.Builder(logger).create_builder_config()
    with pytest.raises(AttributeError, match=r"no writable IBuilderConfig\.int8"):
        config.int8_calibrator = None
    with pytest.raises(TypeError, match="clear_flag"):
        config.clear_flag("TF32")
    with pytest.raises(TypeError, match="set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(AttributeError, match=r"no Builder\.platform_has_fast_fp16"):
        _ = trt.Builder(logger).platform_has_fast_fp16


def test_the_copied_builder_asks_the_driver_as_the_runtime_does(monkeypatch):
    fake_gpu.install_driver(monkeypatch, fake_gpu.FakeDriver())
    found = gpu.this_gpu()
    assert builder.this_gpu() == (found.name, found.compute_capability)
    fake_gpu.install_driver(monkeypatch, fake_gpu.FakeDriver(100))
    for ask, error in ((gpu.this_gpu, EngineError), (builder.this_gpu, BuildError)):
        with pytest.raises(error, match="CUDA_VISIBLE_DEVICES"):
            ask()


def test_no_gpu_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", Mock(side_effect=OSError))
    with pytest.raises(BuildError, match="--script"):
        builder.this_gpu()
