"""Graphs for OpenVINO are rewritten where that is known to be exact, and nowhere else."""

from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as operators

from mirror_runtime.engines.openvino_core import shared_core
from mirror_runtime.engines.openvino_rewrite import rewrite

DRAW = np.random.default_rng(0)


def kinds(model):
    return [node.get_type_name() for node in model.get_ops()]


def orders(model):
    found = [node for node in model.get_ops() if node.get_type_name() == "Transpose"]
    return [node.input_value(1).get_node().data.tolist() for node in found]


def outputs(model, feed):
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(value) for value in compiled(feed).values()]


def scores(order, *, transposed=False, second_reader=False):
    queries = operators.parameter([1, 2, 8, 4], np.float32)
    keys = operators.parameter([1, 8, 2, 4], np.float32)
    moved = operators.transpose(keys, np.array(order))
    made = [operators.matmul(queries, moved, False, transposed)]
    if second_reader:
        made.append(operators.relu(moved))
    return openvino.Model(made, [queries, keys], "scores")


def test_keys_are_transposed_by_the_product_with_the_same_bits():
    plain, rewritten = scores([0, 2, 3, 1]), rewrite(scores([0, 2, 3, 1]))
    assert orders(rewritten) == [[0, 2, 1, 3]]
    feed = [DRAW.normal(size=(1, 2, 8, 4)).astype(np.float32), DRAW.normal(size=(1, 8, 2, 4)).astype(np.float32)]
    assert outputs(rewritten, feed)[0].tobytes() == outputs(plain, feed)[0].tobytes()


@pytest.mark.parametrize(
    "model",
    [scores([0, 2, 1, 3], transposed=True), scores([0, 2, 3, 1], second_reader=True)],
    ids=["transposed already", "read twice"],
)
def test_other_transpositions_stay(model):
    before = orders(model)
    assert orders(rewrite(model)) == before


def product(*, int8=True, bias=True, second_reader=False, axis=-1, by_row=False, reshaped=False):
    rows = operators.parameter([2, 5, 64], np.float32)
    limits = np.float32(-4), np.float32(4)
    rounded = operators.fake_quantize(rows, *limits, *limits, 255)
    weights = DRAW.integers(-127, 128, (64, 48))
    if int8:
        stored = operators.convert(operators.constant(weights.astype(np.int8)), "f32")
        shifted = operators.subtract(stored, operators.constant(np.zeros(48, np.float32)))
        factors = np.linspace(0.1, 2, 64 if by_row or reshaped else 48, dtype=np.float32)
        scale = operators.constant(factors[:, None] if by_row else factors)
        if not by_row:
            scale = operators.reshape(scale, np.array([64, 1] if reshaped else [1, 48]), False)
        matrix = operators.multiply(shifted, scale)
    else:
        matrix = operators.constant(weights.astype(np.float32))
    made = operators.matmul(rounded, matrix, False, False)
    if bias:
        made = operators.add(made, operators.constant(np.arange(48, dtype=np.float32)))
    parts = operators.variadic_split(made, np.int64(axis), np.array([16, 8, 24] if axis == -1 else [1, 1]))
    ends = [operators.relu(part) for part in parts.outputs()]
    if second_reader:
        ends.append(operators.tanh(made))
    return openvino.Model(ends, [rows], "product")


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"by_row": True}], ids=str)
def test_an_int8_product_that_is_split_becomes_several(changes):
    draws = DRAW.bit_generator.state
    plain = product(**changes)
    DRAW.bit_generator.state = draws
    rewritten = rewrite(product(**changes))
    assert "VariadicSplit" not in kinds(rewritten)
    assert kinds(rewritten).count("MatMul") == 3
    rows = [np.random.default_rng(1).normal(size=(2, 5, 64)).astype(np.float32)]
    for found, wanted in zip(outputs(rewritten, rows), outputs(plain, rows), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-5)


OTHERS: list[dict[str, Any]] = [{"int8": False}, {"second_reader": True}, {"axis": 0}, {"reshaped": True}]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_other_products_stay_whole(changes):
    rewritten = rewrite(product(**changes))
    assert kinds(rewritten).count("MatMul") == kinds(rewritten).count("VariadicSplit") == 1
