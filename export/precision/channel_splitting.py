"""Several columns for the widest channels between the two halves of a feed-forward layer, so that int8 resolves them.

A transformer's largest activations lie in a few channels, and a scale wide enough for them leaves too few steps for the
rest. A channel that k columns carry is quantised as if its peak were a k-th of what it is (outlier channel splitting,
Zhao et al. 2019, section 3), and the columns' roundings are staggered, so that together they resolve a k-th of a step.
The first half gives such a channel k times, the second reads all of them: wider weights are all that it costs. A second
product in float for the wide channels (LLM.int8) keeps engines from fusing what stands before and behind the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from export.graph.rewrite import Array, Rewrite

SPARE = 96
"""One column is added for so many channels."""

_ELEMENTWISE = frozenset({"Add", "Div", "Erf", "Gelu", "Mul", "Relu", "Tanh"})


@dataclass(frozen=True)
class Columns:
    """How many columns carry each channel.

    Attributes:
        copies: int64 [channels], at least 1 each.
    """

    copies: NDArray[np.int64]

    @classmethod
    def single(cls, channels: int) -> Columns:
        """Give every channel one column."""
        return cls(np.ones(channels, np.int64))

    @classmethod
    def spread(cls, peak: NDArray[np.float32]) -> Columns:
        """Give the channel with the highest peak a column one column more, until the spare ones are spent.

        Args:
            peak: float32 [channels], the largest magnitude of each.
        """
        copies = np.ones(peak.size, np.int64)
        for _ in range(peak.size // SPARE):
            copies[(peak / copies).argmax()] += 1
        return cls(copies)

    @property
    def widened(self) -> bool:
        """Whether there are more columns than channels."""
        return bool((self.copies > 1).any())

    @property
    def channels(self) -> NDArray[np.int64]:
        """The channel of each column, int64 [columns]: every channel once, then the further columns."""
        own = np.arange(self.copies.size)
        return np.concatenate([own, np.repeat(own, self.copies - 1)])

    @property
    def stagger(self) -> NDArray[np.float32]:
        """What is added to each column before it is rounded, in steps, float32 [columns]; each channel's sum is 0.

        The roundings of x + 1/2k, x + 3/2k, … add up to k x rounded (Hermite's identity).
        """
        nth = np.concatenate([np.zeros_like(self.copies), *(np.arange(1, count) for count in self.copies)])
        steps: NDArray[np.float32] = ((nth + 0.5) / self.copies[self.channels] - 0.5).astype(np.float32)
        return steps


@dataclass(frozen=True)
class FirstHalf:
    """The linear layer whose outputs become a value's channels one for one.

    Attributes:
        product: with its weights.
        addition: of its bias.
    """

    product: NodeProto
    addition: NodeProto


def first_half(graph: Rewrite, name: str) -> FirstHalf | None:
    """Find what gives a value its channels, if nothing but an activation lies between.

    Args:
        graph: as it was exported.
        name: of a value that linear layers read.

    Returns:
        None where another kind of node lies between, or where something else reads a value on the way.
    """
    producers = {out: node for node in graph.nodes for out in node.output}
    within, pending = {name}, [name]
    ends: list[NodeProto] = []
    while pending:
        node = producers.get(pending.pop())
        if node is None or node.op_type not in _ELEMENTWISE:
            return None
        if node.op_type == "Add" and _numbers(graph, node.input[1]) > 1:
            ends.append(node)
            continue
        computed = {read for read in node.input if graph.constant(read) is None}
        if any(_numbers(graph, read) > 1 for read in set(node.input) - computed):
            return None
        pending += computed - within
        within |= computed
    if len(ends) != 1:
        return None
    product = producers.get(ends[0].input[0])
    if product is None or product.op_type != "MatMul" or graph.constant(product.input[1]) is None:
        return None
    inner = {*within, product.output[0]} - {name}
    strangers = [node for node in graph.nodes if inner & set(node.input) and not within & set(node.output)]
    strangers += [node for node in graph.nodes if name in node.input[:1] and node.op_type != "MatMul"]
    strangers += [node for node in graph.nodes if name in node.input[1:]]
    return None if strangers else FirstHalf(product, ends[0])


def _numbers(graph: Rewrite, name: str) -> int:
    """Count a constant's numbers; 0 for a computed value."""
    constant = graph.constant(name)
    return 0 if constant is None else math.prod(constant.dims)


def widen(graph: Rewrite, half: FirstHalf, columns: Columns, readers: Sequence[NodeProto]) -> None:
    """Give a value its further columns: in the weights and bias before it, and in the weights that read it.

    Args:
        graph: is changed.
        half: what `first_half` found.
        columns: of the value.
        readers: the linear layers behind it; each copy of a channel has an equal share of its weights.
    """
    weights, bias = half.product.input[1], half.addition.input[1]
    channels, copies = columns.channels, columns.copies.astype(np.float32)
    graph.add(weights, graph.array(weights)[:, channels])
    graph.add(bias, graph.array(bias)[channels])
    for node in readers:
        rows: Array = graph.array(node.input[1])[channels]
        graph.add(node.input[1], rows / copies[channels, None])
