"""The TensorRT engine with fakes of TensorRT and CUDA that follow the real bindings and compute what they are told."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mirror_runtime.bundle import EngineName, Layout, Precision, to_json
from mirror_runtime.engines import Engine, load_engine
from mirror_runtime.engines.fake import FakeEngine
from mirror_runtime.engines.plan_card import card_path, check_card, read_card
from mirror_runtime.engines.tensorrt_engine import LoadedPlan
from mirror_runtime.errors import EngineError, MissingExtra
from mirror_runtime.packing import PackedRows, ShapeSet, pack
from tests.support.fake_bundles import NAMES, encoder_spec, plan_card
from tests.support.fake_gpu import Gpu, install
from tests.support.tensorrt_binding import VERSIONS

SPEC = encoder_spec()
SHAPES = ShapeSet.up_to(64, budget=256)
FAKE = FakeEngine(Precision.FP16, 1, SPEC)


@pytest.fixture(params=VERSIONS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return install(monkeypatch, request.param, FAKE.run, SPEC.dim)


@pytest.fixture
def engine(gpu: Gpu, tmp_path: Path) -> Iterator[Engine]:
    """Load an engine of one stream, and close it at the end."""
    engine = load(write_plan(tmp_path, gpu.trt.__version__), streams=1)
    yield engine
    engine.close()


def load(plan: Path, precision: Precision = Precision.FP16, streams: int | None = None) -> Engine:
    return load_engine(EngineName.TENSORRT, precision, plan, streams=streams, spec=SPEC)


def write_plan(folder: Path, version: str, **changes: Any) -> Path:
    plan = folder / "model_packed_fp16.plan"
    plan.write_bytes(b"plan")
    card = plan_card(SHAPES.shapes(), **{"tensorrt": version, **changes})
    card_path(plan).write_text(json.dumps(to_json(card)))
    return plan


def batches(count: int = 40) -> list[PackedRows]:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 60, count)
    ids = random.integers(5, 900, int(lengths.sum()))
    return [batch.rows for batch in pack(ids, lengths, SHAPES)]


def test_vectors_are_what_the_plan_computes_for_every_shape_and_twice(gpu: Gpu, tmp_path: Path):
    engine = load(write_plan(tmp_path, gpu.trt.__version__))
    assert (engine.name, engine.precision, engine.streams) == (EngineName.TENSORRT, Precision.FP16, 2)
    rows = batches()
    assert len({r.shape for r in rows}) > 1
    for batch in (*rows, *reversed(rows)):
        np.testing.assert_array_equal(engine.run(batch), FAKE.run(batch))
    assert gpu.cuda.memory
    engine.close()
    assert not gpu.cuda.memory, "closing releases everything"
    called = gpu.cuda.names()
    assert called.count("cudaGraphExecDestroy") == called.count("cudaGraphInstantiate")
    assert called.count("cudaStreamDestroy") == called.count("cudaStreamCreateWithFlags")


def test_each_shape_gets_one_context_one_profile_and_one_graph(gpu: Gpu, engine: Engine):
    rows = batches()
    shapes = list(dict.fromkeys(batch.shape for batch in rows))
    for batch in (*rows, *rows):
        engine.run(batch)
    chosen = [args[0] for name, args in gpu.trt.calls if name == "IExecutionContext.set_optimization_profile_async"]
    assert [SHAPES.shapes()[index] for index in chosen] == shapes
    strategies = [args[0] for name, args in gpu.trt.calls if name == "ICudaEngine.create_execution_context"]
    assert strategies == [gpu.trt.ExecutionContextAllocationStrategy.USER_MANAGED] * len(shapes)
    assert gpu.cuda.names().count("cudaGraphInstantiate") == len(shapes)
    assert gpu.cuda.names().count("cudaGraphLaunch") == 2 * len(rows)
    # TensorRT itself queues only the first run of a shape and its capture.
    assert gpu.trt.names().count("IExecutionContext.execute_async_v3") == 2 * len(shapes)


def test_a_context_is_set_up_before_it_runs_and_runs_before_it_is_captured(gpu: Gpu, engine: Engine):
    gpu.trt.calls.clear()
    engine.run(batches(1)[0])
    contexts = [name.split(".")[1] for name in gpu.trt.names() if name.startswith("IExecutionContext.")]
    assert list(dict.fromkeys(contexts)) == [
        *("set_device_memory", "set_optimization_profile_async", "set_input_shape", "get_tensor_shape"),
        *("set_tensor_address", "execute_async_v3"),
    ]
    called = gpu.cuda.names()
    capture = called.index("cudaStreamBeginCapture")
    assert called[capture - 1] == "cudaStreamSynchronize"
    assert called[capture:] == [
        *("cudaStreamBeginCapture", *["cudaMemcpyAsync"] * 4, "cudaStreamEndCapture"),
        *("cudaGraphInstantiate", "cudaGraphDestroy", "cudaGraphLaunch", "cudaStreamSynchronize"),
    ]
    copies = [args for name, args in gpu.cuda.calls if name == "cudaMemcpyAsync"][-4:]
    bound = [args[1] for name, args in gpu.trt.calls if name == "IExecutionContext.set_tensor_address"]
    assert [args[0] for args in copies[:3]] == bound[:3]
    assert copies[3][1] == bound[3]


def test_threads_share_the_lanes_without_mixing_vectors(engine: Engine):
    rows = batches(80)
    with ThreadPoolExecutor(4) as pool:
        for batch, found in zip(rows * 3, pool.map(engine.run, rows * 3), strict=True):
            np.testing.assert_array_equal(found, FAKE.run(batch))


def test_free_shapes_run_without_a_graph_and_keep_no_memory(gpu: Gpu, tmp_path: Path):
    shapes = ((1, 4), (2, 64), (4, 64))
    profiles: Any = ({name: shapes for name in NAMES},)
    plan = LoadedPlan(write_plan(tmp_path, gpu.trt.__version__, profiles=profiles), streams=1)
    held = len(gpu.cuda.memory)
    (batch,) = batches(1)
    found = plan.run({name: getattr(batch, name) for name in NAMES})
    np.testing.assert_array_equal(found["embedding"], FAKE.run(batch))
    assert "cudaStreamBeginCapture" not in gpu.cuda.names()
    assert len(gpu.cuda.memory) == held
    plan.close()


def test_rows_without_a_profile_are_an_error_that_lists_the_profiles(engine: Engine):
    arrays = np.ones((3, 80), np.int64)
    with pytest.raises(EngineError, match=r"no profile for \(3, 80\).*1x16.*4x64"):
        engine.run(PackedRows(input_ids=arrays, position_ids=arrays, segment_ids=arrays))


def test_what_tensorrt_cannot_do_is_one_clear_error(gpu, tmp_path):
    for answer, message in (
        ("ICudaEngine.create_execution_context", "memory may be full"),
        ("Runtime.deserialize_cuda_engine", "truncated"),
    ):
        gpu.trt.answers[answer] = None
        with pytest.raises(EngineError, match=message):
            load(write_plan(tmp_path, gpu.trt.__version__)).run(batches(1)[0])


def test_a_version_compatible_plan_may_bring_its_loader(gpu: Gpu, tmp_path: Path):
    plan = write_plan(tmp_path, "10.0.1", version_compatible=True)
    load(plan).close()
    assert ("Runtime.engine_host_code_allowed=", (True,)) in gpu.trt.calls


def test_a_plan_of_another_precision_or_layout_or_without_a_card_is_refused(tmp_path):
    for card, message in (
        ({"precision": Precision.FP32}, "computes in fp32, not in fp16"),
        ({"layout": Layout.PADDED}, "packed rows need a packed plan"),
    ):
        with pytest.raises(EngineError, match=message):
            load(write_plan(tmp_path, VERSIONS[1], **card))
    plan = write_plan(tmp_path, VERSIONS[1])
    card_path(plan).unlink()
    with pytest.raises(EngineError, match=r"model_packed_fp16\.plan has no card"):
        read_card(plan)
    card_path(plan).write_text('{"format_version": 2}')
    with pytest.raises(EngineError, match="is not a card of format version 1"):
        read_card(plan)


@pytest.mark.parametrize(
    ("card", "here", "message"),
    [
        ({}, {}, ""),
        ({}, {"tensorrt": "11.3.0.99"}, "of TensorRT 11.4.0.106, but 11.3.0.99 is installed"),
        ({}, {"gpu": "NVIDIA H200"}, "built for NVIDIA L4"),
        ({}, {"compute_capability": "9.0"}, "compute capability 8.9"),
        ({"version_compatible": True}, {"tensorrt": "10.16.1.11"}, "the older 10.16.1.11 is installed"),
        ({"version_compatible": True, "tensorrt": "10.16.1.11"}, {}, ""),
        ({"hardware": "ampere-plus"}, {"gpu": "Tesla T4", "compute_capability": "7.5"}, "this is Tesla T4"),
        ({"hardware": "ampere-plus"}, {"gpu": "NVIDIA H200", "compute_capability": "9.0"}, ""),
        ({"hardware": "same-compute-capability"}, {"compute_capability": "9.0"}, "this is NVIDIA L4"),
        ({"hardware": "same-compute-capability"}, {"gpu": "NVIDIA L40S"}, ""),
        ({"hardware": "everything"}, {}, "must be one of none"),
    ],
)
def test_a_plan_runs_only_where_it_may(tmp_path: Path, card: dict[str, Any], here: dict[str, str], message: str):
    read = dataclasses.replace(read_card(write_plan(tmp_path, "11.4.0.106")), **card)
    host = {"tensorrt": "11.4.0.106", "gpu": "NVIDIA L4", "compute_capability": "8.9", **here}
    with pytest.raises(EngineError, match=re.escape(message)) if message else nullcontext():
        check_card(read, **host)


def test_without_tensorrt_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtra, match=r"\[tensorrt\]"):
        load(write_plan(tmp_path, VERSIONS[1]))


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here: nothing to refuse")
def test_the_real_cuda_binding_without_a_gpu_is_one_clear_error(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.delitem(sys.modules, "cuda.bindings.runtime")
    with pytest.raises(EngineError, match="no NVIDIA GPU can be used here"):
        load(write_plan(tmp_path, gpu.trt.__version__))
