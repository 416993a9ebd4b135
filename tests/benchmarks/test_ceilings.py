"""Ceilings are of the precision they name, and a floor is no higher than what bounds a text."""

import dataclasses

import onnx
import pytest

from benchmarks import bandwidth
from benchmarks.bandwidth import floor_ms, last_cache_bytes, measure_bandwidth
from benchmarks.ceilings import EncoderShape, measure_ceiling
from benchmarks.products import PAIRS, Matrices, compile_openvino, onnxruntime_session
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError


@pytest.fixture(scope="module")
def matrices() -> Matrices:
    return Matrices.draw(64, 128, 256)


def ran_as(compiled) -> list[tuple[str, str]]:
    """Give the precision and the primitive of every product in the graph that OpenVINO executes."""
    found = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    products = [info for info in found if info["layerType"].astype(str) in ("FullyConnected", "MatMul")]
    return [(info["runtimePrecision"].astype(str), info["primitiveType"].astype(str)) for info in products]


def test_every_openvino_product_of_the_int8_ceiling_runs_in_int8(matrices):
    ran = ran_as(compile_openvino(Precision.INT8, matrices, threads=1, streams=1))
    assert len(ran) == 2 * PAIRS
    assert {precision for precision, _ in ran} == {"i8"}
    assert all(primitive.endswith("_i8") for _, primitive in ran), ran
    assert {precision for precision, _ in ran_as(compile_openvino(Precision.FP32, matrices, threads=1, streams=1))} == {
        "f32"
    }


def test_every_onnxruntime_product_of_the_int8_ceiling_runs_in_int8(matrices, tmp_path):
    onnxruntime_session(Precision.INT8, matrices, 1, str(tmp_path / "optimized.onnx"))
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearMatMul") + kinds.count("MatMulIntegerToFloat") == 2 * PAIRS
    assert "MatMul" not in kinds
    assert len(kinds) == 2 * PAIRS + 1  # and nothing else but the first rows' way into 8 bits


@pytest.mark.parametrize("engine", [EngineName.OPENVINO, EngineName.ONNXRUNTIME])
def test_a_ceiling_counts_what_its_samples_did(engine):
    ceiling = measure_ceiling(engine, Precision.INT8, EncoderShape(layers=1, hidden=64, intermediate=128), 2)
    assert ceiling.gflop_per_s == pytest.approx(ceiling.flop_per_sample / min(ceiling.samples_s) / 1e9)
    runs = 2 * ceiling.threads if engine is EngineName.OPENVINO else 2
    assert ceiling.flop_per_sample == runs * 2 * PAIRS * 2 * ceiling.rows * ceiling.inner * ceiling.outer


@pytest.mark.parametrize("engine", [EngineName.OPENVINO, EngineName.ONNXRUNTIME])
def test_a_precision_without_a_ceiling_is_named(engine):
    with pytest.raises(EngineError, match=f"no ceiling is measured for {engine.value} fp16"):
        measure_ceiling(engine, Precision.FP16, EncoderShape(layers=1, hidden=64, intermediate=128), 2)


def test_memory_is_read_and_copied_by_all_cores(monkeypatch):
    monkeypatch.setattr(bandwidth, "REPETITIONS", 2)
    found = measure_bandwidth(2**20)
    assert found.array_bytes == 2**20
    assert found.read_gb_per_s == pytest.approx(2**20 / min(found.read_samples_s) / 1e9)
    assert found.copy_gb_per_s == pytest.approx(2 * 2**20 / min(found.copy_samples_s) / 1e9)


def test_the_floor_is_the_longer_of_arithmetic_and_memory(report):
    (ceiling,), memory = report.ceilings, report.bandwidth
    assert memory is not None
    memory = dataclasses.replace(memory, cache_bytes=0, read_gb_per_s=20.0)
    ceiling = dataclasses.replace(ceiling, gflop_per_s=500.0)
    arguments = {"flop_per_token": 20_000_000, "ceiling": ceiling, "bandwidth": memory}
    # 10 million weights, 2 bytes each, at 20 GB/s take 1 ms; 8 tokens at 500 GFLOP/s take 0.32 ms.
    assert floor_ms(8, Precision.BF16, **arguments) == pytest.approx(1.0)
    assert floor_ms(8, Precision.INT8, **arguments) == pytest.approx(0.5)
    assert floor_ms(100, Precision.BF16, **arguments) == pytest.approx(4.0)
    cached = dataclasses.replace(memory, cache_bytes=15_000_000)  # 5 MB of 20 come from memory each time
    assert floor_ms(1, Precision.BF16, **{**arguments, "bandwidth": cached}) == pytest.approx(0.25)
    for unknown in arguments:
        assert floor_ms(8, Precision.BF16, **{**arguments, unknown: None}) is None


def test_the_last_cache_is_the_largest(tmp_path):
    for index, size in enumerate(("32K", "1024K", "32M")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n")
    assert last_cache_bytes(tmp_path) == 32 * 2**20
    assert last_cache_bytes(tmp_path / "none") == 0
