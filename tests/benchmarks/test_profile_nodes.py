"""The table of nodes counts every product with weights, and only those."""

import pytest

from benchmarks import profile_nodes
from benchmarks.plan import read_shape
from benchmarks.profile_nodes import _sizes, profile
from mirror_runtime.bundle import EngineName, Precision, read_manifest
from mirror_runtime.engines.openvino_core import read_graph
from mirror_runtime.errors import InputError


def test_the_operations_of_all_products_are_those_of_the_encoder(tiny_bundle):
    model = read_graph(tiny_bundle / "onnx/model_packed.onnx", None)
    groups, milliseconds = profile(model, Precision.FP32, 2, 64, runs=10)
    shape = read_shape(tiny_bundle)
    assert shape is not None
    products = [group for group in groups if group.flop]
    assert sum(group.flop for group in products) == 2 * 64 * shape.flop_per_token
    assert sum(group.nodes for group in products) == 6 * shape.layers
    assert 0 < sum(group.microseconds for group in groups) / 1e3 < 1.1 * milliseconds


@pytest.mark.parametrize("bf16", [True, False])
def test_by_default_it_profiles_what_the_bundle_has_for_openvino_and_the_cpu_runs(
    make_bundle, make_artifact, monkeypatch, bf16
):
    fp32, half, int8 = Precision.FP32, Precision.BF16, Precision.INT8
    pairs = [(EngineName.ONNXRUNTIME, fp32), (EngineName.OPENVINO, half), (EngineName.OPENVINO, int8)]
    manifest = read_manifest(make_bundle(artifacts=tuple(make_artifact(*pair) for pair in pairs)))
    monkeypatch.setattr(profile_nodes, "has_bf16", lambda: bf16)
    assert profile_nodes._precisions(manifest) == ([half, int8] if bf16 else [int8])


@pytest.mark.parametrize("shape", ["16", "x64", "0x64", "16x64x2", "-1x16"])
def test_a_shape_that_cannot_be_read_is_named(shape):
    with pytest.raises(InputError, match=f"--shape {shape}: give rows and tokens"):
        _sizes(shape)
