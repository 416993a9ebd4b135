"""An ONNX graph as the checks read it: types and constants by name, producers and consumers of values."""

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

from export.graph.inference import infer_types
from mirror_runtime.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Breach:
    """One place of a graph that breaks one rule.

    Attributes:
        rule: such as "quantization".
        node: the node's operator and name, or "graph".
        problem: what is wrong, and the remedy where there is one.
    """

    rule: str
    node: str
    problem: str

    def __str__(self) -> str:
        return f"{self.node}: {self.problem} [{self.rule}]"


class GraphView:
    """A loaded graph. Subgraphs (If, Loop) are not examined: our encoder graphs have none.

    Args:
        proto: the model, with its weights.

    Attributes:
        nodes: in the graph's order.
        opset: version of ai.onnx.
        inputs: by name.
        producer: the node that computes a value, by the value's name.
        consumers: the nodes that read a value, by the value's name.
        types: element type of every value, as far as it is declared or inferred.
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
        self.types = infer_types(proto, self.nodes, proto.graph.initializer, strict=False)
        self.types |= {name: tensor.data_type for name, tensor in self._tensors.items()}

    @classmethod
    def load(cls, path: Path) -> GraphView:
        """Read an ONNX file with its weights.

        Raises:
            EngineError: it is missing, truncated or not an ONNX file.
        """
        try:
            return cls(onnx.load(path))
        except (OSError, DecodeError, onnx.checker.ValidationError) as error:
            raise EngineError(f"{path} cannot be read as ONNX: {error}. Export it again") from error

    def label(self, node: NodeProto) -> str:
        """Return a node's name for messages."""
        return f"{node.op_type} {node.name or (node.output[0] if node.output else 'without name')}"

    @property
    def constants(self) -> Mapping[str, TensorProto]:
        """Weights and the values of `Constant` nodes, by name."""
        return self._tensors

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return a constant's values; None for a computed value."""
        if name not in self._tensors:
            return None
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._tensors[name])
        return self._arrays[name]

    def is_weight(self, name: str) -> bool:
        """Return whether a value is constant, or computed from a constant by quantising and rearranging only."""
        if name in self._tensors:
            return True
        node = self.producer.get(name)
        movers = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Identity", "Cast")
        return node is not None and node.op_type in movers and self.is_weight(node.input[0])


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute's value, or the default where the node does not have it."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def floats(array: NDArray[Any]) -> NDArray[np.float64]:
    """Convert values of any number type, including fp16, bf16 and fp8, to float64."""
    return (
        np.asarray(array).astype(np.float32).astype(np.float64) if array.dtype.kind == "V" else array.astype(np.float64)
    )
