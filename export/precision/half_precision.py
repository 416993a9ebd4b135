"""Convert a graph to fp16 or bf16, strongly typed, so that TensorRT and CUDA compute in the types of the file.

Library converters do not fit: those of onnxruntime.transformers and onnxconverter_common support fp16 only and leave
pairs of casts around blocked nodes; nvidia-modelopt's `onnx` extra requires another build of ONNX Runtime.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from export.graph.rewrite import Array, Rewrite
from export.graph.trace import Graph
from mirror_runtime.bundle import Precision
from mirror_runtime.errors import EngineError

HALVES: Mapping[Precision, int] = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}

_NUMPY: Mapping[int, np.dtype[np.generic]] = {
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}

LARGEST_FP16 = 65504.0

SCALES_OPSET = 19
"""The first opset in which QuantizeLinear accepts scales in half precision."""


def write_half(source: Graph, path: Path, half: Precision, *, precision: Precision | None = None) -> Graph:
    """Write a graph with weights, matrix products and softmax in fp16 or bf16, and its head in fp32.

    LayerNormalization stays one operator with `stash_type` 1: input and output in half precision, statistics in fp32.
    The statistics of an RMSNorm are computed in fp32 between casts: squares exceed fp16, and means of them lose digits.
    Everything after the last of them (pooling, dense layers, norms) is computed in fp32. Inputs and outputs do not
    change.

    Args:
        source: an fp32 graph, or a quantised one whose other operators are fp32.
        path: the file to write.
        half: fp16 or bf16.
        precision: recorded in the file as that of its matrix products; None for `half` itself.

    Raises:
        EngineError: a constant of the graph is infinite in fp16.
    """
    kind = HALVES[half]
    graph = Rewrite(source.path)
    backbone = graph.backbone()
    types = graph.element_types()
    chains = _rms_statistics(graph)
    exact = {out for chain in chains for node in chain for out in node.output}
    between = exact - {chain[-1].output[0] for chain in chains}
    halved = {n for n in backbone - between if types.get(n) == TensorProto.FLOAT and n not in graph.inputs}
    body = [n for n in graph.nodes if any(out in backbone for out in n.output) and n.output[0] not in exact]
    head = [node for node in graph.nodes if not any(out in backbone for out in node.output)]
    halves = {name: f"{name}_half" if graph.constant(name) else name for name in halved}
    for name in sorted(halved):
        if graph.constant(name) is not None:
            graph.add(halves[name], _halve(graph.array(name), kind, name))
    for node in body:
        node.input[:] = [halves.get(name, name) for name in node.input]
        _retype(node, kind)
    body += [cast for chain in chains for cast in _keep_full(graph, chain, halved, kind)]
    for name in sorted(halved):
        # Back to fp32 for the head, and for values that are outputs of the graph.
        readers = [node for node in head if name in node.input]
        if graph.constant(name) is None and (readers or name in graph.outputs):
            inner = f"{name}_half"
            for node in body:
                node.input[:] = [inner if read == name else read for read in node.input]
                node.output[:] = [inner if out == name else out for out in node.output]
            graph.node("Cast", [inner], [name], to=TensorProto.FLOAT)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in body):
        graph.opset = max(graph.opset, SCALES_OPSET)
    return graph.save(source, path, precision or half)


def _rms_statistics(graph: Rewrite) -> list[list[NodeProto]]:
    """Find the chains of nodes from the square of an RMSNorm's input to the reciprocal of its root."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.input:
            readers[name].append(node)
    producers = {out: node for node in graph.nodes for out in node.output}
    chains = []
    for mean in (node for node in graph.nodes if node.op_type == "ReduceMean"):
        chain = [producers[mean.input[0]], mean]
        while chain[-1].op_type != "Reciprocal" and len(after := readers[chain[-1].output[0]]) == 1:
            chain.append(after[0])
        if [node.op_type for node in chain] == ["Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal"]:
            chains.append(chain)
    return chains


def _keep_full(graph: Rewrite, chain: list[NodeProto], halved: set[str], kind: int) -> list[NodeProto]:
    """Put casts around nodes that stay fp32, and return the casts."""
    values, root = chain[0].input[0], chain[-1].output[0]
    for node in chain:
        node.input[:] = [f"{name}_full" if name == values else name for name in node.input]
    casts = [graph.node("Cast", [values], [f"{values}_full"], to=TensorProto.FLOAT)]
    if root in halved:  # the last norm's root is of the head
        chain[-1].output[0] = f"{root}_full"
        casts.append(graph.node("Cast", [f"{root}_full"], [root], to=kind))
    return casts


def _halve(values: Array, kind: int, name: str) -> Array:
    largest = np.abs(values).max(initial=0.0)
    if kind == TensorProto.FLOAT16 and not largest <= LARGEST_FP16:
        raise EngineError(f"{name} reaches {largest:.3g}, which fp16 cannot hold: export bf16")
    return values.astype(_NUMPY[kind])


def _retype(node: NodeProto, kind: int) -> None:
    """Change a node's fp32 attributes, casts and inline constants, to the half type in place."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = kind
        elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            halved = _halve(numpy_helper.to_array(attribute.t), kind, node.name)
            attribute.t.CopyFrom(numpy_helper.from_array(halved, attribute.t.name))
