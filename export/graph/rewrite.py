"""Rewrite an ONNX graph in memory: look up constants, add and remove nodes, try it out, and save a checked file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graph.trace import Graph, Signature, check_graph, save_graph
from mirror_runtime.bundle import Precision
from mirror_runtime.engines.onnxruntime_engine import PRECISION_KEY, open_session
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores

Array = NDArray[Any]

BACKBONE_OPERATORS = frozenset({"LayerNormalization", "Softmax", "ReduceMean"})
"""Operators that only the transformer has; ReduceMean is an RMSNorm's."""

SHAPE_VALUES = 1024
"""Constants with more values than this are weights, on which no shape depends."""


class Rewrite:
    """A graph in memory, whose `nodes` and `opset` may be changed.

    Nodes may be added in any order: saving sorts them and drops the unused ones.
    """

    def __init__(self, path: Path) -> None:
        self._proto = onnx.load(path)
        self.nodes: list[NodeProto] = list(self._proto.graph.node)
        self.opset = next(entry.version for entry in self._proto.opset_import if entry.domain == "")
        self._constants = {tensor.name: tensor for tensor in self._proto.graph.initializer}
        self.inputs = frozenset(value.name for value in self._proto.graph.input)
        self.outputs = tuple(value.name for value in self._proto.graph.output)

    def constant(self, name: str) -> TensorProto | None:
        """Return a constant as it is stored; None for a computed value."""
        return self._constants.get(name)

    def is_vector(self, name: str) -> bool:
        """Whether a name is that of a constant with one dimension and several values."""
        constant = self._constants.get(name)
        return constant is not None and len(constant.dims) == 1 and constant.dims[0] > 1

    def array(self, name: str) -> Array:
        """Return a constant's values."""
        values: Array = numpy_helper.to_array(self._constants[name])
        return values

    def add(self, name: str, values: Array) -> str:
        """Add or replace a constant, and return its name."""
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def unshare(self) -> None:
        """Copy weights that several matrix products or sums read, so that each has its own: some layers share them."""
        used: set[str] = set()
        for number, node in enumerate(node for node in self.nodes if node.op_type in ("MatMul", "Add")):
            for at, name in enumerate(node.input):
                constant = self.constant(name)
                if constant is not None and name in used and math.prod(constant.dims) > 1:
                    node.input[at] = self.add(f"{name}_copy_{number}", self.array(name))
                used.add(name)

    def node(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
        """Add a node, named after its operator and first output, and return it."""
        made = helper.make_node(operator, list(inputs), list(outputs), name=f"{operator}_{outputs[0]}", **attributes)
        self.nodes.append(made)
        return made

    def backbone(self) -> frozenset[str]:
        """Return the names of the transformer's values: all that a norm or Softmax reads or writes.

        Everything after the last of them (pooling, dense layers, norms) is the head.
        """
        pending = [out for n in self.nodes if n.op_type in BACKBONE_OPERATORS for out in n.output]
        producers = {out: n for n in self.nodes for out in n.output}
        found: set[str] = set()
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending.extend(producers[name].input if name in producers else ())
        return frozenset(found)

    def element_types(self) -> dict[str, int]:
        """Infer the element type of every value; an inconsistent graph is an EngineError."""
        try:
            return infer_types(self._proto, self.nodes, self._constants.values(), strict=True)
        except onnx.shape_inference.InferenceError as error:
            raise EngineError(f"the graph is inconsistent: {error}") from error

    def save(self, source: Graph, path: Path, precision: Precision) -> Graph:
        """Write the file, and check it against the standard, strict types, and the inputs and outputs of its source.

        Raises:
            EngineError: see `check_graph`.
        """
        save_graph(self._model(precision), path)
        check_graph(path, Signature(inputs=source.inputs, outputs=source.outputs))
        return replace(source, path=path)

    def session(self, *, extra_outputs: Sequence[str] = (), switches: Sequence[str] = (), fused: bool = True) -> Any:
        """Open the graph in its present state in ONNX Runtime, to try it out.

        Args:
            extra_outputs: inner values that become outputs, after the graph's own.
            switches: boolean inputs that the nodes read in addition to the graph's own.
            fused: see `open_session`.
        """
        model = self._model(Precision.FP32, extra_outputs, switches)
        with TemporaryDirectory() as folder:
            save_graph(model, Path(folder) / "graph.onnx")
            return open_session(Path(folder) / "graph.onnx", threads=usable_cores(), fused=fused)

    def _model(
        self, precision: Precision, extra_outputs: Sequence[str] = (), switches: Sequence[str] = ()
    ) -> onnx.ModelProto:
        nodes = _sorted(self.nodes, {*self._constants, *self.inputs, *switches}, (*self.outputs, *extra_outputs))
        used = {name for n in nodes for name in n.input}
        proto = onnx.ModelProto()
        proto.ir_version = max(self._proto.ir_version, 9)  # the first version with float8
        proto.producer_name = self._proto.producer_name
        proto.producer_version = self._proto.producer_version
        proto.opset_import.append(helper.make_opsetid("", self.opset))
        proto.metadata_props.add(key=PRECISION_KEY, value=precision.value)
        proto.graph.name = self._proto.graph.name
        proto.graph.node.extend(nodes)
        proto.graph.input.extend(self._proto.graph.input)
        proto.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in switches)
        proto.graph.output.extend(self._proto.graph.output)
        proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in extra_outputs)
        proto.graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in used)
        return proto


def infer_types(
    model: onnx.ModelProto, nodes: Iterable[NodeProto], constants: Iterable[TensorProto], *, strict: bool
) -> dict[str, int]:
    """Return the element type of every value of a graph, as far as inference gets.

    Weights take part by their types alone: inference needs no values of them, and takes no more than 2 GiB.

    Args:
        model: supplies opset, inputs and outputs.
        nodes: the graph's nodes.
        constants: the graph's constants.
        strict: raise an InferenceError where the graph is inconsistent, instead of leaving types out.
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


def _sorted(nodes: Iterable[NodeProto], known: set[str], outputs: Sequence[str]) -> list[NodeProto]:
    """Order nodes so that each comes after the nodes it reads, and leave out those that no output needs."""
    producers = {out: n for n in nodes for out in n.output}
    ordered: list[NodeProto] = []
    done, opened = {*known, ""}, set[str]()
    stack = list(reversed(outputs))
    while stack:
        name = stack[-1]
        missing = [] if name in done else [read for read in producers[name].input if read not in done]
        if missing:
            if name in opened:  # all that it reads was ordered before it came up again
                raise EngineError(f"the graph has a cycle: {name} depends on itself")
            opened.add(name)
            stack.extend(missing)
            continue
        stack.pop()
        if name not in done:
            ordered.append(producers[name])
            done.update(producers[name].output)
    return ordered
