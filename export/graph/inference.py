"""Infer the element types of a graph's values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx
from onnx import NodeProto, TensorProto, helper

SHAPE_VALUES = 1024
"""Constants with more values than this are weights, on which no shape depends."""


def infer_types(
    model: onnx.ModelProto, nodes: Iterable[NodeProto], constants: Iterable[TensorProto], *, strict: bool
) -> dict[str, int]:
    """Return the element type of every value of a graph, as far as inference gets.

    Weights take part by their types alone: inference needs no values of them, and takes no more than 2 GiB.

    Args:
        model: supplies opset, inputs and outputs.
        nodes: the graph's nodes.
        constants: the graph's constants.
        strict: raise where the graph is inconsistent, instead of leaving types out.

    Raises:
        onnx.shape_inference.InferenceError: `strict`, and the graph is inconsistent.
    """
    shell = onnx.ModelProto()
    shell.ir_version = model.ir_version
    shell.opset_import.extend(model.opset_import)
    graph = shell.graph
    graph.name = model.graph.name
    graph.node.extend(nodes)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    types = {}
    for tensor in constants:
        types[tensor.name] = tensor.data_type
        if math.prod(tensor.dims) > SHAPE_VALUES:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            graph.initializer.append(tensor)
    inferred = onnx.shape_inference.infer_shapes(shell, check_type=strict, strict_mode=strict).graph
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.tensor_type.elem_type:
            types[value.name] = value.type.tensor_type.elem_type
    return types
