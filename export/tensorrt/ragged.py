"""A packed graph whose attention knows where texts begin, for TensorRT 11.1 and newer, in place of the block mask.

The block mask makes attention compute the scores of all pairs of a row and hide those of different texts. TensorRT's
operator `TRT_Attention` instead takes tokens one after another, [tokens, heads, head dim], and cumulative lengths of
the texts, and computes each text's own pairs. Its schema is that of onnx-tensorrt's docs/TRT_custom_ops.md, whose twin
is `IAttention` with `AttentionIOForm.PACKED_NHD`, which the 11.4 binding has. No machine of ours has run it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graph.trace import Graph, save_graph, signature_of
from mirror_runtime.bundle import ONE_TOKEN, Pooling
from mirror_runtime.errors import EngineError

OPERATOR, DOMAIN = "TRT_Attention", "trt"  # the parser finds it by its name; the domain keeps other readers away
LENGTHS = ("query_lengths", "key_value_lengths")
"""Inputs, int32 [runs + 1], see `PackedRows.run_ends`. They are equal, but have to be two tensors: others report that
TensorRT crashes where one is wired to both."""

OLDEST = (11, 1)
ADDS_IN_FP32 = (11, 3)
"""From here on a fused fp16 attention adds up in fp32 where casts to fp32 surround it. Older ones add up in fp16, and
would have no fused kernel for the casts."""

_SWAP = [0, 2, 1, 3]  # [rows, heads, tokens, head dim] and [rows, tokens, heads, head dim]
_FROM_KEYS = [0, 3, 1, 2]  # from the transposed keys, [rows, heads, head dim, tokens]


def write_ragged(source: Graph, path: Path, half: int | None = None, pooling: Pooling | None = None) -> Graph:
    """Write a packed graph with ragged attention; it has the `LENGTHS` as inputs, besides its own.

    Args:
        source: a packed graph.
        path: the file to write.
        half: the graph's own type, to surround attention with casts to fp32 and back: see `ADDS_IN_FP32`.
        pooling: the encoder's, for the message.

    Raises:
        EngineError: a layer's attention also has a window, a causal mask or a bias, which ragged attention would lose,
            or the pooling reads one token a text, so that the last layer has no queries of the others.
    """
    proto = onnx.load(source.path)
    producers = {out: node for node in proto.graph.node for out in node.output}
    softmaxes = [node for node in proto.graph.node if node.op_type == "Softmax"]
    masks = [set(producers[node.input[0]].input) - set(_scores(producers, node)) for node in softmaxes]
    if not _are_block_masks(producers, masks):
        problem = "attention with a window, a causal mask or a bias of positions, which ragged attention does not have"
        if pooling is not None and pooling in ONE_TOKEN and _are_block_masks(producers, masks[:-1]):
            problem = f"only one token a text in its last layer (pooling {pooling.value}), and ragged attention has all"
        raise EngineError(f"{source.path.name} has {problem}: build the plan without --ragged")
    for number, softmax in enumerate(softmaxes):
        _replace(proto, producers, softmax, number, half)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "all_tokens"))
    inputs = (helper.make_tensor_value_info(name, TensorProto.INT32, ["runs"]) for name in LENGTHS)
    proto.graph.input.extend(inputs)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    _drop_unused(proto)
    save_graph(proto, path)
    return replace(source, path=path, inputs=signature_of(proto).inputs)


def _scores(producers: Mapping[str, NodeProto], softmax: NodeProto) -> list[str]:
    """Return the input of the mask's sum that holds the scaled products."""
    return [name for name in producers[softmax.input[0]].input if _is_product(producers, name)]


def _is_product(producers: Mapping[str, NodeProto], name: str) -> bool:
    scaled = producers.get(name)
    return scaled is not None and scaled.op_type == "Mul" and producers[scaled.input[0]].op_type == "MatMul"


def _are_block_masks(producers: Mapping[str, NodeProto], masks: Sequence[set[str]]) -> bool:
    """Return whether all layers have the same mask, which says no more than that two tokens are of one text."""
    together = set().union(*masks)
    return len(together) == 1 and _is_block_mask(producers, *together)


def _is_block_mask(producers: Mapping[str, NodeProto], name: str) -> bool:
    """Return whether a mask says no more than that two tokens are of one text."""
    mask = producers.get(name)
    return mask is not None and mask.op_type == "Where" and producers[mask.input[0]].op_type == "Equal"


def _replace(
    proto: ModelProto, producers: Mapping[str, NodeProto], softmax: NodeProto, number: int, half: int | None
) -> None:
    """Put the operator in the place of one layer's products, mask and Softmax."""
    (scores,) = _scores(producers, softmax)
    scaled = producers[scores]
    queries, keys = producers[scaled.input[0]].input
    context = next(node for node in proto.graph.node if softmax.output[0] in node.input)
    made: list[NodeProto] = []

    def node(kind: str, *inputs: str, to: str, domain: str = "", to_type: int | None = None, **attributes: Any) -> str:
        name = f"ragged_{number}_{to}"
        cast: dict[str, Any] = {} if to_type is None else {"to": to_type}
        made.append(helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes, **cast))
        return name

    def flat(what: str, name: str, perm: list[int]) -> str:
        """Lay the tokens of all rows one after another."""
        turned = node("Transpose", name, to=f"{what}_turned", perm=perm)
        heads = node("Shape", turned, to=f"{what}_heads", start=2, end=4)
        shape = node("Concat", "all_tokens", heads, to=f"{what}_shape", axis=0)
        tokens = node("Reshape", turned, shape, to=what)
        return tokens if half is None else node("Cast", tokens, to=f"{what}_wide", to_type=TensorProto.FLOAT)

    query = flat("query", node("Mul", queries, scaled.input[1], to="scaled"), _SWAP)
    key, value = flat("key", keys, _FROM_KEYS), flat("value", context.input[1], _SWAP)
    forms: dict[str, Any] = {
        "query_form": "packed_nhd",
        "kv_form": "packed_nhd",
        "causal_kind": "none",
        "TRT_decomposable": 0,
    }
    attended = node(OPERATOR, query, key, value, "", *LENGTHS, to="attended", domain=DOMAIN, **forms)
    if half is not None:
        attended = node("Cast", attended, to="narrow", to_type=half)
    shape = node("Shape", f"ragged_{number}_query_turned", to="shape")
    rows = node("Reshape", attended, shape, to="rows")
    made.append(
        helper.make_node("Transpose", [rows], list(context.output), name=f"ragged_{number}_context", perm=_SWAP)
    )
    at = list(proto.graph.node).index(context)
    proto.graph.node.remove(context)
    for offset, new in enumerate(made):
        proto.graph.node.insert(at + offset, new)


def _drop_unused(proto: ModelProto) -> None:
    """Remove the nodes and constants that nothing reads any more."""
    while True:
        read = {name for node in proto.graph.node for name in node.input} | {out.name for out in proto.graph.output}
        unused = [node for node in proto.graph.node if not read.intersection(node.output)]
        if not unused:
            break
        for node in unused:
            proto.graph.node.remove(node)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
