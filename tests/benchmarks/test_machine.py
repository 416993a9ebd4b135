"""Ceilings are of the precision they name, a floor stays below its bounds, reference work fits its rows."""

import dataclasses
import os

import onnx
import pytest

from benchmarks.machine import ceilings
from benchmarks.machine.ceilings import (
    BATCH_RUNS,
    SINGLE_RUNS,
    ceiling_of,
    floor_of,
    last_cache_bytes,
    measure_ceiling,
    measure_memory,
    reference_work,
)
from benchmarks.machine.host import clocks_mhz, describe_host, governor
from benchmarks.machine.products import PAIRS, Sizes, compile_openvino, onnxruntime_session, seconds_of
from benchmarks.plan import EncoderShape, Variant, read_shape
from benchmarks.recorder import Recorder
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import TOKEN_BUDGET

ENGINES = pytest.mark.parametrize("engine", [EngineName.OPENVINO, EngineName.ONNXRUNTIME])
SHAPE = EncoderShape(layers=1, hidden=128, intermediate=256)
SIZES = Sizes(64, 128, 256)


def executed(compiled) -> list[tuple[str, str]]:
    """Return the precision and the primitive of every product in the graph that OpenVINO executes."""
    found = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    products = [info for info in found if info["layerType"].astype(str) in ("FullyConnected", "MatMul")]
    return [(info["runtimePrecision"].astype(str), info["primitiveType"].astype(str)) for info in products]


def test_every_openvino_product_of_the_int8_ceiling_runs_in_int8():
    found = executed(compile_openvino(Precision.INT8, SIZES, threads=1, streams=1))
    assert len(found) == 2 * PAIRS
    assert {precision for precision, _ in found} == {"i8"}
    assert all(primitive.endswith("_i8") for _, primitive in found), found
    fp32 = executed(compile_openvino(Precision.FP32, SIZES, threads=1, streams=1))
    assert {precision for precision, _ in fp32} == {"f32"}


def test_every_onnxruntime_product_of_the_int8_ceiling_runs_in_int8(tmp_path):
    onnxruntime_session(Precision.INT8, SIZES, 1, str(tmp_path / "optimized.onnx"))
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearMatMul") + kinds.count("MatMulIntegerToFloat") == 2 * PAIRS
    assert "MatMul" not in kinds
    assert len(kinds) == 2 * PAIRS + 1  # and only the first rows' quantisation beside them


@ENGINES
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_a_ceiling_counts_the_operations_of_its_samples(engine, precision, monkeypatch):
    monkeypatch.setattr(ceilings, "seconds_of", lambda work, runs: (seconds_of(work, 1), 0.5)[1:])
    recorder = Recorder()
    measure_ceiling(recorder, engine, precision, EncoderShape(layers=1, hidden=64, intermediate=128), 2)
    (ceiling,) = recorder.measurements
    runs = 2 * usable_cores() if engine is EngineName.OPENVINO else 2
    assert ceiling.samples == (runs * 2 * PAIRS * 2 * TOKEN_BUDGET * 64 * 192 / 0.5 / 1e9,)  # 3 x 64 is the widest
    assert ceiling.conditions["best shape"] == f"[{TOKEN_BUDGET}, 64] x [64, 192]"


@pytest.mark.parametrize("name", ["openvino fp16", "onnxruntime fp16", "onnxruntime bf16", "fake fp32"])
def test_a_precision_without_a_ceiling_is_named(name):
    engine, precision = name.split()
    with pytest.raises(EngineError, match=f"no ceiling is measured for {name}"):
        measure_ceiling(Recorder(), EngineName(engine), Precision(precision), SHAPE, 2)


def test_memory_is_read_and_copied_by_all_cores_and_the_last_cache_is_the_largest(monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr(ceilings, "seconds_of", lambda work, _runs: (work() and 0.25, 0.5)[1:])
    measure_memory(recorder, 2**20)
    read, copied = recorder.measurements
    assert (read.samples, copied.samples) == ((2**20 / 0.5 / 1e9,), (2 * 2**20 / 0.5 / 1e9,))
    assert read.conditions["array MiB"] == 1.0
    for index, size in enumerate(("32K", "1024K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_cache_bytes(tmp_path) == 32 * 2**20
    assert last_cache_bytes(tmp_path / "none") == 0


@pytest.fixture
def variant(plan) -> Variant:
    parity = plan.variants[0].parity
    return Variant(engine=EngineName.OPENVINO, precision=Precision.BF16, artifact="x", parity=parity)


def with_ceiling(variant: Variant) -> Recorder:
    recorder = Recorder()
    recorder.record("ceilings", variant.name, "matrix products", 400.0, 500.0, unit="GFLOP/s")
    return recorder


@pytest.mark.parametrize(
    ("tokens", "precision", "cache_mib", "expected"),
    [
        # 8 million weights, 2 bytes each, at 16 GB/s take 1 ms; 8 tokens at 500 GFLOP/s take 0.25 ms.
        (8, Precision.BF16, 0.0, 1.0),
        (8, Precision.INT8, 0.0, 0.5),
        (100, Precision.BF16, 0.0, 3.2),
        (1, Precision.BF16, 12e6 / 2**20, 0.25),  # 4 MB of 16 come from memory each time
    ],
)
def test_the_floor_is_the_longer_of_arithmetic_and_memory(plan, variant, tokens, precision, cache_mib, expected):
    shape = EncoderShape(layers=1, hidden=1000, intermediate=2000)  # 4 and 4 million weights
    plan, variant = dataclasses.replace(plan, shape=shape), dataclasses.replace(variant, precision=precision)
    recorder, without = with_ceiling(variant), Recorder()
    assert ceiling_of(variant, recorder.measurements) == 500.0
    assert floor_of(variant, tokens, plan, recorder.measurements) is None
    for one in (recorder, without):
        one.record("ceilings", "memory", "memory read", 16.0, unit="GB/s", conditions={"last cache MiB": cache_mib})
    assert floor_of(variant, tokens, plan, without.measurements) is None
    assert floor_of(variant, tokens, plan, recorder.measurements) == pytest.approx(expected)


@ENGINES
def test_reference_work_takes_longer_for_more_rows(plan, variant, engine):
    variant = dataclasses.replace(variant, engine=engine, precision=Precision.INT8)
    short, long = (reference_work(plan, variant, with_ceiling(variant), tokens) for tokens in (16, 512))
    assert short is not None
    assert long is not None
    assert 0 < short() < long()


@pytest.mark.parametrize(
    ("tokens", "rows", "streams", "runs"), [(48, 48, 1, SINGLE_RUNS), (None, TOKEN_BUDGET, usable_cores(), BATCH_RUNS)]
)
def test_reference_work_has_the_rows_and_streams_of_what_it_stands_beside(
    plan, variant, monkeypatch, tokens, rows, streams, runs
):
    made, calls = [], []

    def repeated(engine, precision, sizes, *, streams, turns):
        made.append((engine, precision, sizes, streams, turns))
        return lambda: calls.append(1), turns * streams

    monkeypatch.setattr(ceilings, "repeated", repeated)
    measure = reference_work(plan, variant, with_ceiling(variant), tokens)
    assert measure is not None
    assert made == [(variant.engine, variant.precision, Sizes(rows, 128, 256), streams, 1)]
    calls.clear()  # the warm-up
    assert measure() >= 0
    assert len(calls) == runs


def test_reference_work_that_there_cannot_be_is_none(plan, variant, monkeypatch):
    recorder = Recorder()
    assert reference_work(plan, variant, recorder) is None
    assert not recorder.failures  # the ceiling's own failure has the reason

    def repeated(*_, **__):
        raise EngineError("openvino cannot compile the products")

    monkeypatch.setattr(ceilings, "repeated", repeated)
    recorder = with_ceiling(variant)
    assert reference_work(plan, variant, recorder, 16) is None
    (failure,) = recorder.failures
    assert (failure.suite, failure.reason) == ("latency", "openvino cannot compile the products")


@pytest.mark.parametrize(
    ("content", "flop"),
    [
        # 6 layers of 4 * 384^2 + 2 * 384 * 1536 = 1,769,472 weights, of two operations each
        (
            '{"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}',
            2 * 6 * 1_769_472,
        ),
        ('{"model_type": "distilbert", "n_layers": 6, "dim": 384, "hidden_dim": 1536}', 2 * 6 * 1_769_472),
        # It has a third feed-forward matrix.
        ('{"model_type": "qwen3", "num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}', None),
        *((content, None) for content in (None, "{}", '{"model_type": "bert"}', "[]", "{")),
    ],
)
def test_a_token_costs_two_operations_a_weight_if_the_config_has_sizes(tmp_path, content, flop):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    shape = read_shape(tmp_path)
    assert (shape and shape.flop_per_token) == flop


def test_clocks_and_governor_are_the_systems_own(tmp_path):
    cpuinfo, scaling = tmp_path / "cpuinfo", tmp_path / "governor"
    cpuinfo.write_text("processor\t: 0\ncpu MHz\t\t: 2600.5\n\nprocessor\t: 1\ncpu MHz\t\t: 3100.0\n")
    scaling.write_text("performance\n")
    assert (clocks_mhz(cpuinfo), governor(scaling)) == ((2600.5, 3100.0), "performance")
    assert (clocks_mhz(tmp_path / "none"), governor(tmp_path / "none")) == ((), None)


def test_variables_that_change_threads_are_recorded_and_no_others(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "2", "A_SECRET": "x"})
    host = describe_host()
    assert host.thread_environment == {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "2"}
    assert set(host.affinity) == os.sched_getaffinity(0)
