"""An ONNX graph as the checks read it: types and constants by name, producers and consumers of values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graph.rewrite import infer_types
from mirror_runtime.errors import EngineError

Finding = tuple[str, str]
"""A breach of a rule: the node's label, or "graph", and what is wrong with it."""

TYPE_NAMES: Mapping[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
    TensorProto.INT8: "INT8",
    TensorProto.INT4: "INT4",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
"""TensorRT's names of the element types that it has; every other type is a breach."""


class GraphView:
    """A loaded graph with its weights. Subgraphs (If, Loop) are not examined: our encoder graphs have none."""

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
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in proto.graph.initializer}
        for node in self.nodes:
            value = attribute(node, "value") if node.op_type == "Constant" else None
            if value is not None:
                self.constants[node.output[0]] = value
        # As far as they are declared or inferred.
        self.types = infer_types(proto, self.nodes, proto.graph.initializer, strict=False)
        self.types |= {name: tensor.data_type for name, tensor in self.constants.items()}

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

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return a constant's values; None for a computed value."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def is_weight(self, name: str) -> bool:
        """Return whether a value is constant, or computed from a constant by quantising and rearranging only."""
        if name in self.constants:
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
