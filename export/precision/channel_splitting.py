"""Split the widest channels inside a feed-forward layer into several columns, so that int8 resolves them.

A transformer's largest activations lie in a few channels, and a scale wide enough for them leaves too few steps for the
others. A channel split into k columns is quantised as if its peak were a k-th (outlier channel splitting, Zhao et al.
2019, section 3). The roundings of the columns are staggered, so together they resolve a k-th of a step. The producing
layer outputs such a channel k times and the reading layer sums the copies: the only cost is wider weights. A second
product in float for the wide channels (LLM.int8) would keep engines from fusing the operators around the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from export.graph.rewrite import Array, Rewrite

CHANNELS_PER_EXTRA_COLUMN = 96
"""One column is added for this many channels."""

_ELEMENTWISE = frozenset({"Add", "Div", "Erf", "Gelu", "Mul", "Relu", "Tanh"})


@dataclass(frozen=True)
class Columns:
    """The number of columns of each channel."""

    copies: NDArray[np.int64]  # [channels], each at least 1

    @classmethod
    def unsplit(cls, channels: int) -> Columns:
        """Assign one column to every channel."""
        return cls(np.ones(channels, np.int64))

    @classmethod
    def split(cls, peak: NDArray[np.float32]) -> Columns:
        """Add columns, each to the channel with the highest peak [channels] per column at that point."""
        copies = np.ones(peak.size, np.int64)
        for _ in range(peak.size // CHANNELS_PER_EXTRA_COLUMN):
            copies[(peak / copies).argmax()] += 1
        return cls(copies)

    @property
    def has_splits(self) -> bool:
        """Whether there are more columns than channels."""
        return bool((self.copies > 1).any())

    @property
    def channels(self) -> NDArray[np.int64]:
        """The channel of each column, int64 [columns]: every channel once, then the additional columns."""
        own = np.arange(self.copies.size)
        return np.concatenate([own, np.repeat(own, self.copies - 1)])

    @property
    def stagger(self) -> NDArray[np.float32]:
        """The offset added to each column before rounding, in steps, float32 [columns]; the sum over a channel is 0.

        The roundings of x + 1/2k, x + 3/2k, … add up to k x rounded (Hermite's identity).
        """
        nth = np.concatenate([np.zeros_like(self.copies), *(np.arange(1, count) for count in self.copies)])
        steps: NDArray[np.float32] = ((nth + 0.5) / self.copies[self.channels] - 0.5).astype(np.float32)
        return steps


class ProducingLayer(NamedTuple):
    """The linear layer whose outputs become the channels of a value, one for one."""

    product: NodeProto
    addition: NodeProto


def producing_layer(graph: Rewrite, name: str) -> ProducingLayer | None:
    """Find the linear layer that produces a value through nothing but an activation function.

    Returns:
        None where other nodes lie in between, or other nodes read a value in between.
    """
    producers = {out: node for node in graph.nodes for out in node.output}
    between, pending = {name}, [name]
    additions: list[NodeProto] = []
    while pending:
        node = producers.get(pending.pop())
        if node is None or node.op_type not in _ELEMENTWISE:
            return None
        if node.op_type == "Add" and _size(graph, node.input[1]) > 1:
            additions.append(node)
            continue
        computed = {read for read in node.input if graph.constant(read) is None}
        if any(_size(graph, read) > 1 for read in set(node.input) - computed):
            return None
        pending += computed - between
        between |= computed
    if len(additions) != 1:
        return None
    product = producers.get(additions[0].input[0])
    if product is None or product.op_type != "MatMul" or graph.constant(product.input[1]) is None:
        return None
    inner = {*between, product.output[0]} - {name}
    other_readers = [node for node in graph.nodes if inner & set(node.input) and not between & set(node.output)]
    other_readers += [node for node in graph.nodes if name in node.input[:1] and node.op_type != "MatMul"]
    other_readers += [node for node in graph.nodes if name in node.input[1:]]
    return None if other_readers else ProducingLayer(product, additions[0])


def _size(graph: Rewrite, name: str) -> int:
    """Return the number of a constant's values; 0 for a computed value."""
    constant = graph.constant(name)
    return 0 if constant is None else math.prod(constant.dims)


def split_channels(graph: Rewrite, producer: ProducingLayer, columns: Columns, readers: Sequence[NodeProto]) -> None:
    """Split a value's channels, in the weights and bias that produce it and in the weights that read it.

    In the linear layers that read it, each copy of a channel gets an equal share of its weights.
    """
    weights, bias = (node.input[1] for node in producer)
    channels, copies = columns.channels, columns.copies.astype(np.float32)
    graph.add(weights, graph.array(weights)[:, channels])
    graph.add(bias, graph.array(bias)[channels])
    for node in readers:
        rows: Array = graph.array(node.input[1])[channels]
        graph.add(node.input[1], rows / copies[channels, None])
