"""Channel splitting: staggered roundings are finer, and channels are split only behind a plain activation."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph.rewrite import Rewrite
from export.precision.channel_splitting import CHANNELS_PER_EXTRA_COLUMN, Columns, producing_layer, split_channels


def graph(tmp_path, *, reader="MatMul", between=(), second_reader=None) -> Rewrite:
    """Build x [2, 4] -> product, bias, tanh, the nodes `between` -> `v`, and its reader."""
    draw = np.random.default_rng(0)
    constants = {
        "w": draw.normal(size=(4, 6)),
        "b": draw.normal(size=6),
        "u": draw.normal(size=(6, 3)),
        "s": np.ones(1),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("Tanh", ["q"], ["t"]),
        *between,
        helper.make_node("Mul", ["t2" if between else "t", "s"], ["v"]),
        helper.make_node(reader, ["v", "u"] if reader == "MatMul" else ["v"], ["y"]),
    ]
    outputs = ["y"]
    if second_reader is not None:
        nodes.append(helper.make_node("Relu", [second_reader], ["z"]))
        outputs.append("z")
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in constants.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    return Rewrite(tmp_path / "g.onnx")


@pytest.mark.parametrize(
    "changes",
    [
        {"reader": "Neg"},
        {"second_reader": "v"},
        {"second_reader": "t"},
        {"second_reader": "q"},
        {"second_reader": "p"},
        {"between": (helper.make_node("Softmax", ["t"], ["t2"]),)},
        {"between": (helper.make_node("Mul", ["t", "b"], ["t2"]),)},
    ],
    ids=str,
)
def test_values_with_other_readers_or_operators_are_not_split(tmp_path, changes):
    assert producing_layer(graph(tmp_path, **changes), "v") is None


def test_a_split_graph_computes_the_same(tmp_path):
    plain, wide = graph(tmp_path), graph(tmp_path)
    assert producing_layer(wide, "x") is None, "an input is not split"
    half = producing_layer(wide, "v")
    assert half is not None
    assert (half.product.output[0], half.addition.output[0]) == ("p", "q")
    readers = [node for node in wide.nodes if node.op_type == "MatMul" and node.input[0] == "v"]
    split_channels(wide, half, Columns(np.array([1, 3, 1, 1, 2, 1])), readers)
    assert wide.array("w").shape == (4, 9)
    feed = {"x": np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)}
    found, wanted = (made.session().run(None, feed)[0] for made in (wide, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_extra_columns_go_to_the_highest_peaks():
    peak = np.ones(3 * CHANNELS_PER_EXTRA_COLUMN, np.float32)
    peak[[7, 9]] = 10, 4
    columns = Columns.split(peak)
    assert columns.copies[7] == 3  # 10, then 5, then 3.3, when 4 is higher
    assert columns.copies[9] == 2
    assert columns.copies.sum() == 3 * CHANNELS_PER_EXTRA_COLUMN + 3
    assert columns.channels[-3:].tolist() == [7, 7, 9]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_staggered_roundings_resolve_a_kth_of_a_step(count):
    columns = Columns(np.array([count]))
    values = np.linspace(-3, 3, 1001)
    together = np.rint(values[:, None] + columns.stagger).sum(1) / count
    assert np.abs(together - values).max() <= 0.5 / count + 1e-6
    assert columns.stagger.sum() == pytest.approx(0, abs=1e-6)
