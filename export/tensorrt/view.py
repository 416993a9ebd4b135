"""An ONNX graph as the checks read it: types and constants by name, producers and consumers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mirror_runtime.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Breach:
    """One rule that one place of a graph breaks.

    Attributes:
        rule: which, such as "quantization".
        node: the node's operator and name, or the graph's.
        problem: what is wrong there, with the cure where there is one.
    """

    rule: str
    node: str
    problem: str

    def __str__(self) -> str:
        return f"{self.node}: {self.problem} [{self.rule}]"


class GraphView:
    """A loaded graph. Subgraphs (If, Loop) are not looked into: no encoder graph of ours has one.

    Args:
        proto: the model, with its weights.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes: Sequence[NodeProto] = proto.graph.node
        self.opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        self.inputs = {value.name: value for value in proto.graph.input}
        self.producer: Mapping[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
        self._tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in proto.graph.initializer}
        for node in self.nodes:
            value = attribute(node, "value") if node.op_type == "Constant" else None
            if value is not None:
                self._tensors[node.output[0]] = value
        self._arrays: dict[str, NDArray[Any]] = {}
        self.types = self._types()

    @classmethod
    def load(cls, path: Path) -> GraphView:
        """Read an ONNX file with its weights.

        Raises:
            EngineError: it is missing, truncated or no ONNX file.
        """
        try:
            return cls(onnx.load(path))
        except (OSError, DecodeError, onnx.checker.ValidationError) as error:
            raise EngineError(f"{path} cannot be read as ONNX: {error}. Export it again") from error

    def label(self, node: NodeProto) -> str:
        """Name a node in messages."""
        return f"{node.op_type} {node.name or (node.output[0] if node.output else 'without name')}"

    @property
    def constants(self) -> Mapping[str, TensorProto]:
        """Weights and `Constant` nodes by name."""
        return self._tensors

    def constant(self, name: str) -> NDArray[Any] | None:
        """Give a constant's values, or None where the value is computed."""
        if name not in self._tensors:
            return None
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._tensors[name])
        return self._arrays[name]

    def is_weight(self, name: str) -> bool:
        """Tell whether a value is constant or computed from constants by quantising and moving alone."""
        if name in self._tensors:
            return True
        node = self.producer.get(name)
        movers = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Identity", "Cast")
        return node is not None and node.op_type in movers and self.is_weight(node.input[0])

    def _types(self) -> dict[str, int]:
        """Element type of every value: declared, of constants, and inferred as far as inference gets."""
        types = {name: tensor.data_type for name, tensor in self._tensors.items()}
        inferred = onnx.shape_inference.infer_shapes(_without_weights(self.proto)).graph
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
                types[value.name] = value.type.tensor_type.elem_type
        return types


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Give an attribute's value, or the default where the node has none."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def floats(array: NDArray[Any]) -> NDArray[np.float64]:
    """Give values of any number type, fp16, bf16 and fp8 included, as float64."""
    return (
        np.asarray(array).astype(np.float32).astype(np.float64) if array.dtype.kind == "V" else array.astype(np.float64)
    )


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model without its large weights: type inference needs their types only, and takes no more than 2 GiB."""
    shell = onnx.ModelProto()
    shell.opset_import.extend(proto.opset_import)
    shell.ir_version = proto.ir_version
    graph = shell.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() < 1 << 16:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return shell
