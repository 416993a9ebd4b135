"""An ONNX graph being rewritten: what is constant, what feeds what, and a file at the end that is checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graph.trace import EXTERNAL_DATA_BYTES, Graph, Signature, check_graph, save
from mirror_runtime.bundle import Precision
from mirror_runtime.engines.onnxruntime_engine import PRECISION_KEY, open_session
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores

Array = NDArray[Any]

INFERRED_NUMBERS = 1024
"""Constants of more numbers are weights: shapes do not follow from them."""


class Rewrite:
    """A graph in memory. Nodes may be added in any order: they are sorted, and what is unused is dropped, on saving.

    Args:
        path: the ONNX file; weights beside it are read too.

    Attributes:
        nodes: to be edited in place.
        opset: of ai.onnx; may be raised.
    """

    def __init__(self, path: Path) -> None:
        self._proto = onnx.load(path)
        self.nodes: list[NodeProto] = list(self._proto.graph.node)
        self.opset = next(entry.version for entry in self._proto.opset_import if entry.domain == "")
        self._constants = {tensor.name: tensor for tensor in self._proto.graph.initializer}
        self.inputs = frozenset(value.name for value in self._proto.graph.input)
        self.outputs = tuple(value.name for value in self._proto.graph.output)

    def constant(self, name: str) -> TensorProto | None:
        """Give a constant as it is stored, or None for a computed value."""
        return self._constants.get(name)

    def array(self, name: str) -> Array:
        """Give a constant's values."""
        values: Array = numpy_helper.to_array(self._constants[name])
        return values

    def add(self, name: str, values: Array) -> str:
        """Add or replace a constant; gives its name."""
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def node(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
        """Make and add a node, named after its first output."""
        made = helper.make_node(operator, list(inputs), list(outputs), name=f"{operator}_{outputs[0]}", **attributes)
        self.nodes.append(made)
        return made

    def backbone(self) -> frozenset[str]:
        """Name the values of the transformer: what some LayerNormalization or Softmax depends on or gives.

        What follows the last of them (pooling, dense layers, norms) is the head.
        """
        wanted = [out for n in self.nodes if n.op_type in ("LayerNormalization", "Softmax") for out in n.output]
        producers = {out: n for n in self.nodes for out in n.output}
        seen: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name not in seen:
                seen.add(name)
                wanted.extend(producers[name].input if name in producers else ())
        return frozenset(seen)

    def element_types(self) -> dict[str, int]:
        """Infer the element type of every value.

        Raises:
            EngineError: the graph contradicts itself.
        """
        proto = onnx.ModelProto()
        proto.ir_version = self._proto.ir_version
        proto.opset_import.extend(self._proto.opset_import)
        proto.graph.name = self._proto.graph.name
        proto.graph.node.extend(self.nodes)
        proto.graph.input.extend(self._proto.graph.input)
        proto.graph.output.extend(self._proto.graph.output)
        for name, tensor in self._constants.items():
            if math.prod(tensor.dims) > INFERRED_NUMBERS:  # weights: their types count, not their numbers
                proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
            else:
                proto.graph.initializer.append(tensor)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
        except onnx.shape_inference.InferenceError as error:
            raise EngineError(f"the graph contradicts itself: {error}") from error
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        return types | {name: tensor.data_type for name, tensor in self._constants.items()}

    def save(self, path: Path, precision: Precision, *, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> None:
        """Write the file; more than `external_data_bytes` bytes of weights go to `<path>_data` beside it."""
        save(self._model(precision), path, external_data_bytes)

    def session(self, *, reading: Sequence[str] = (), switches: Sequence[str] = (), fused: bool = True) -> Any:
        """Open the graph as it stands in ONNX Runtime, to try it out.

        Args:
            reading: inner values that become outputs, after the graph's own.
            switches: boolean inputs that the nodes read besides the graph's own.
            fused: see `open_session`.
        """
        model = self._model(Precision.FP32, reading, switches)
        with TemporaryDirectory() as folder:
            save(model, Path(folder) / "graph.onnx", EXTERNAL_DATA_BYTES)
            return open_session(Path(folder) / "graph.onnx", threads=usable_cores(), fused=fused)

    def _model(
        self, precision: Precision, reading: Sequence[str] = (), switches: Sequence[str] = ()
    ) -> onnx.ModelProto:
        nodes = _sorted(self.nodes, {*self._constants, *self.inputs, *switches}, (*self.outputs, *reading))
        used = {name for n in nodes for name in n.input}
        proto = onnx.ModelProto()
        proto.ir_version = max(self._proto.ir_version, 9)  # the first that holds float8
        proto.producer_name = self._proto.producer_name
        proto.producer_version = self._proto.producer_version
        proto.opset_import.append(helper.make_opsetid("", self.opset))
        proto.metadata_props.add(key=PRECISION_KEY, value=precision.value)
        proto.graph.name = self._proto.graph.name
        proto.graph.node.extend(nodes)
        proto.graph.input.extend(self._proto.graph.input)
        proto.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in switches)
        proto.graph.output.extend(self._proto.graph.output)
        proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in reading)
        proto.graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in used)
        return proto


def checked(source: Graph, path: Path) -> Graph:
    """Hold a rewritten file against the standard, strict types, and the inputs and outputs it was made from.

    Raises:
        EngineError: see `check_graph`.
    """
    check_graph(path, Signature(inputs=source.inputs, outputs=source.outputs))
    return Graph(layout=source.layout, path=path, inputs=source.inputs, outputs=source.outputs)


def _sorted(nodes: Iterable[NodeProto], known: set[str], outputs: Sequence[str]) -> list[NodeProto]:
    """Order nodes so that each follows what it reads, and leave out those that no output needs."""
    producers = {out: n for n in nodes for out in n.output}
    ordered: list[NodeProto] = []
    done = {*known, ""}
    stack = list(reversed(outputs))
    while stack:
        name = stack[-1]
        missing = [] if name in done else [read for read in producers[name].input if read not in done]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if name not in done:
            ordered.append(producers[name])
            done.update(producers[name].output)
    return ordered
