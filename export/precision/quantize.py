"""Quantise a graph to int8 or fp8 with QuantizeLinear and DequantizeLinear pairs, whose scales are measured.

Weights have one scale per channel, activations one constant scale per tensor, all symmetric with zero point 0. No scale
depends on the batch, so neither does a text's vector; ONNX Runtime's dynamic int8 takes its scales from the whole batch
and fails the proof of batch invariance. Three techniques make one scale per tensor sufficient: SmoothQuant (section 4:
an activation's channels are divided, the weights' rows multiplied) with an exponent chosen for each layer, splitting
the widest channels of a feed-forward layer (`export.precision.channel_splitting`), and a margin above the range seen in
calibration. Layers that still cost too much stay in float; they are found by leaving out each in turn.

Library quantisers do not fit: ONNX Runtime's does no smoothing, NNCF's smooths all layers with one exponent; both leave
the embedding table, half of a small encoder, in float or under one scale, and neither measures what a layer costs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from export.graph.rewrite import Array, Rewrite
from export.graph.trace import Graph
from export.precision.calibration import ActivationStats, Calibration, Origin, Vectors, linear_inputs
from export.precision.channel_splitting import Columns, producing_layer, split_channels
from export.precision.half_precision import write_half
from export.proof.floors import Floors
from mirror_runtime.bundle import Precision

LayerKey = tuple[bytes, int]
"""A linear layer's weights, and how many layers before it have the same."""

FLOOR_MARGIN = 0.005
"""Layers are left in float until the worst calibration text is this far above the proof's floor."""

EXPONENTS = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
"""Exponents of the activations' peaks in the smoothing factor; 0 means no smoothing."""

SPLITTING_GAIN = 0.8
"""Channels are split only where this reduces the layer's error to this share or less."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16 number: scales are fp16 in graphs whose other operators are."""


@dataclass(frozen=True, kw_only=True)
class RangeMargin:
    """How far a scale reaches beyond the range seen in calibration. Clipping costs other texts more."""

    headroom: float  # factor on the measured peak
    raised_share: float  # share of channels, those with the smallest peaks, raised to the next larger peak


RANGE_MARGINS: Mapping[Origin, RangeMargin] = {
    Origin.NORM: RangeMargin(headroom=1.2, raised_share=0.5),
    # Attention averages over ordinary text, so peaks are lower than for a text that repeats one word.
    Origin.ATTENTION: RangeMargin(headroom=2.0, raised_share=0.5),
    # Most channels fire on few texts: one that did not fire in calibration may fire as strongly as the others.
    Origin.ACTIVATION: RangeMargin(headroom=1.2, raised_share=0.8),
}
"""Found on MiniLM: calibrated on docstrings, the worst of 1,000 STS-B sentences rose from cosine 0.974 to 0.990."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A quantised number format."""

    largest: float  # the largest number it represents at scale 1
    dtype: np.dtype[np.generic]
    opset: int  # the first that has it


FORMATS: Mapping[Precision, Format] = {
    Precision.INT8: Format(largest=127.0, dtype=np.dtype(np.int8), opset=13),
    Precision.FP8: Format(largest=448.0, dtype=np.dtype(ml_dtypes.float8_e4m3fn), opset=19),
}


@dataclass(frozen=True, kw_only=True)
class QuantizedInput:
    """How a value that one or several linear layers read is quantised."""

    smoothing: Vectors  # [channels]: the value is divided by it, the weights' rows are multiplied by it
    scale: float  # of the divided value
    columns: Columns
    error: float  # relative error of the layers' outputs on calibration text
    layers: frozenset[LayerKey] = frozenset()  # that read the value
    quantized: bool = True  # False leaves these layers in float

    def rounded_value(self, name: str) -> str:
        """Return the name of the value that is rounded in place of the value `name`."""
        if self.columns.has_splits:
            return f"{name}_staggered"
        return f"{name}_smooth" if (self.smoothing != 1).any() else name


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """How the linear layers of an encoder's padded and packed graph are quantised."""

    precision: Precision
    inputs: tuple[QuantizedInput, ...]  # in the order of the packed graph's `linear_inputs`
    worst_cosine: float  # over the calibration texts


def plan_quantization(graph: Path, calibration: Calibration, precision: Precision) -> QuantizationPlan:
    """Choose scales, smoothing, and the layers of an fp32 packed graph that stay in float."""
    rewrite = Rewrite(graph)
    form = FORMATS[precision]
    inputs: list[QuantizedInput] = []
    keys = _layer_keys(rewrite)
    for stats, (name, nodes) in zip(calibration.activations, linear_inputs(rewrite).items(), strict=True):
        weights = np.concatenate([rewrite.array(node.input[1]) for node in nodes], axis=1)
        layers = frozenset(keys[node.output[0]] for node in nodes)
        # Splitting does not help fp8: its steps grow with the number.
        splittable = precision is Precision.INT8 and producing_layer(rewrite, name) is not None
        inputs.append(replace(best_quantization(stats, weights, form, splittable=splittable), layers=layers))
    target = Floors.of(precision, calibration.spec).reference + FLOOR_MARGIN
    cosines = calibration.cosines(_session(graph, inputs, form))
    if cosines.min() < target:
        for i in _rank_by_gain(graph, inputs, form, calibration, cosines):
            inputs[i] = replace(inputs[i], quantized=False)
            cosines = calibration.cosines(_session(graph, inputs, form))
            if cosines.min() >= target:
                break
    return QuantizationPlan(precision=precision, inputs=tuple(inputs), worst_cosine=float(cosines.min()))


def best_quantization(
    stats: ActivationStats, weights: Array, form: Format, *, splittable: bool = False
) -> QuantizedInput:
    """Try smoothing exponents and channel splitting, and return the variant that changes the layers' outputs least.

    The weights are float32 [channels, outputs]; `splittable` allows the value's channels to be split.
    """
    unsplit = _best_smoothing(stats, weights, form, Columns.unsplit(stats.peak.size))
    if not splittable:
        return unsplit
    split = _best_smoothing(stats, weights, form, Columns.split(stats.peak))
    return split if split.error <= SPLITTING_GAIN * unsplit.error else unsplit


def _best_smoothing(stats: ActivationStats, weights: Array, form: Format, columns: Columns) -> QuantizedInput:
    """Find the smoothing and the scale with the smallest error for these columns."""
    channels, stagger = columns.channels, columns.stagger
    expected = stats.rows @ weights
    power = max(float((expected**2).sum()), 1e-12)
    margin = RANGE_MARGINS[stats.origin]
    smallest_peak = max(float(np.quantile(stats.peak, margin.raised_share)), 1e-5)
    peak = (np.maximum(stats.peak, smallest_peak) / columns.copies).astype(np.float32)
    largest_weight = np.maximum(np.abs(weights).max(1), 1e-5)
    rows, weights = stats.rows[:, channels] / columns.copies[channels], weights[channels]

    def attempt(factor: Vectors) -> QuantizedInput:
        scale = max(float((peak / factor).max()) * margin.headroom / form.largest, SMALLEST_SCALE)
        values = rounded(rows / factor[channels] / scale + stagger, form).astype(np.float32) * scale
        stored, scales = quantize_columns(weights * factor[channels, None], form)
        error = float((((values @ (stored.astype(np.float32) * scales)) - expected) ** 2).sum()) / power
        smoothing = (factor * columns.copies).astype(np.float32)
        return QuantizedInput(smoothing=smoothing, scale=scale, columns=columns, error=error)

    factors = [peak**exponent for exponent in EXPONENTS]
    factors += [peak**exponent / largest_weight ** (1 - exponent) for exponent in EXPONENTS if 0 < exponent < 1]
    normalized = [(factor / np.exp(np.log(factor).mean())).astype(np.float32) for factor in factors]
    return min((attempt(factor) for factor in normalized), key=lambda candidate: candidate.error)


def write_quantized_for_gpu(source: Graph, path: Path, plan: QuantizationPlan) -> Graph:
    """Write a graph with quantised linear layers and everything else in fp16, for TensorRT and CUDA.

    Raises:
        EngineError: the file breaks the contract, or fp16 cannot hold the weights.
    """
    with TemporaryDirectory(dir=path.parent) as folder:
        inner = write_quantized(source, Path(folder) / path.name, plan, tables=False)
        return write_half(inner, path, Precision.FP16, precision=plan.precision)


def write_quantized(source: Graph, path: Path, plan: QuantizationPlan, *, tables: bool = True) -> Graph:
    """Write a graph with quantised linear layers and everything else in fp32, for CPUs.

    Layers that read the same value (query, key, value) become one product, which ONNX Runtime runs in int8 as a whole.

    With `tables`, embedding tables are int8 with one scale per row. TensorRT's Gather does not accept int8.

    Raises:
        EngineError: the file breaks the contract.
    """
    graph = Rewrite(source.path)
    _quantize(graph, plan.inputs, FORMATS[plan.precision])
    if tables:
        _quantize_tables(graph)
    return graph.save(source, path, plan.precision)


def rounded(values: Array, form: Format) -> Array:
    """Round to the format's numbers, with saturation."""
    clipped = np.clip(values, -form.largest, form.largest)
    return (np.rint(clipped) if form.dtype == np.int8 else clipped).astype(form.dtype)


def quantize_columns(weights: Array, form: Format) -> tuple[Array, Vectors]:
    """Quantise a matrix with one scale per column; return the stored numbers and the scales, float32 [columns]."""
    scales = np.maximum(np.abs(weights).max(0) / form.largest, SMALLEST_SCALE).astype(np.float32)
    return rounded(weights / scales, form), scales


def _layer_keys(graph: Rewrite) -> dict[str, LayerKey]:
    """Identify linear layers, by the name of their output, in a way that an encoder's padded and packed graph share.

    Their weights do not suffice: where layers share them, each place has scales of its own.
    """
    places: Counter[bytes] = Counter()
    keys = {}
    for node in itertools.chain.from_iterable(linear_inputs(graph).values()):
        weights = bytes(graph.array(node.input[1])[0].tobytes())
        keys[node.output[0]] = (weights, places[weights])
        places[weights] += 1
    return keys


def _assigned(
    graph: Rewrite, inputs: Sequence[QuantizedInput]
) -> list[tuple[str, str, QuantizedInput, list[NodeProto]]]:
    """Assign a graph's linear layers to the quantised inputs of the packed graph.

    A value may belong to two of them: where the packed graph computes only [CLS] in the last layer, the query reads
    another value than key and value do, while in the padded graph all three read the same one.

    Returns:
        The value, a prefix for the names of the nodes made from it, its quantisation, and the layers.
    """
    index_of_layer = {layer: i for i, quantized in enumerate(inputs) for layer in quantized.layers}
    keys = _layer_keys(graph)
    assigned: list[tuple[str, str, QuantizedInput, list[NodeProto]]] = []
    for value, nodes in linear_inputs(graph).items():
        readers: dict[int, list[NodeProto]] = {}
        for node in nodes:
            readers.setdefault(index_of_layer[keys[node.output[0]]], []).append(node)
        for nth, (i, layers) in enumerate(readers.items()):
            # Not `_1`: PyTorch numbers its values like that.
            assigned.append((value, value if nth == 0 else f"{value}_group_{nth}", inputs[i], layers))
    return assigned


def _quantize(graph: Rewrite, inputs: Sequence[QuantizedInput], form: Format) -> None:
    """Quantise a graph's linear layers in place."""
    graph.opset = max(graph.opset, form.opset)
    graph.unshare()
    assigned = [entry for entry in _assigned(graph, inputs) if entry[2].quantized]
    for value, _, quantized, nodes in assigned:
        if quantized.columns.has_splits:
            producer = producing_layer(graph, value)
            assert producer is not None  # the padded and the packed graph have the same layers
            split_channels(graph, producer, quantized.columns, nodes)
    for value, name, quantized, nodes in assigned:
        smoothing = quantized.smoothing[quantized.columns.channels]
        if (smoothing != 1).any():
            graph.node("Mul", [value, graph.add(f"{name}_smoothing", 1 / smoothing)], [f"{name}_smooth"])
            value = f"{name}_smooth"
        if quantized.columns.has_splits:
            stagger = graph.add(f"{name}_stagger", quantized.columns.stagger * np.float32(quantized.scale))
            graph.node("Add", [value, stagger], [f"{name}_staggered"])
        scale = graph.add(f"{name}_scale", np.array(quantized.scale, np.float32))
        zero = graph.add(f"{name}_zero", np.zeros((), form.dtype))
        graph.node("QuantizeLinear", [quantized.rounded_value(name), scale, zero], [f"{name}_quantized"])
        graph.node("DequantizeLinear", [f"{name}_quantized", scale, zero], [f"{name}_dequantized"])
        combined = np.concatenate([graph.array(node.input[1]) for node in nodes], axis=1)
        stored, scales = quantize_columns(combined * smoothing[:, None], form)
        first = nodes[0].output[0]
        weight = [
            graph.add(f"{first}_weight", stored),
            graph.add(f"{first}_weight_scale", scales),
            graph.add(f"{first}_weight_zero", np.zeros(scales.shape, form.dtype)),
        ]
        graph.node("DequantizeLinear", weight, [f"{first}_weight_dequantized"], axis=1)
        graph.nodes[:] = [node for node in graph.nodes if node not in nodes]
        product = first if len(nodes) == 1 else f"{first}_together"
        graph.node("MatMul", [f"{name}_dequantized", f"{first}_weight_dequantized"], [product])
        if len(nodes) > 1:
            _split(graph, product, nodes)


def _split(graph: Rewrite, product: str, nodes: Sequence[NodeProto]) -> None:
    """Split one product into the outputs of several layers, after the biases if all have one: engines fuse one Add."""
    outputs = [node.output[0] for node in nodes]
    readers = [node for node in graph.nodes if set(outputs) & set(node.input)]
    added = {node.input[0]: node for node in readers if node.op_type == "Add" and graph.constant(node.input[1])}
    if len(readers) == len(added) == len(outputs):
        sums = [added[name] for name in outputs]
        bias = graph.add(f"{product}_bias", np.concatenate([graph.array(node.input[1]) for node in sums]))
        graph.node("Add", [product, bias], [f"{product}_biased"])
        graph.nodes[:] = [node for node in graph.nodes if node not in sums]
        product, outputs = f"{product}_biased", [node.output[0] for node in sums]
    widths = [graph.array(node.input[1]).shape[1] for node in nodes]
    sizes = graph.add(f"{product}_sizes", np.array(widths, np.int64))
    graph.node("Split", [product, sizes], outputs, axis=-1)


def _quantize_tables(graph: Rewrite) -> None:
    """Store embedding tables as int8: a row and its scale are gathered, then multiplied."""
    form = FORMATS[Precision.INT8]
    for node in [node for node in graph.nodes if node.op_type == "Gather"]:
        tensor = graph.constant(node.input[0])
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
            continue
        name, result = node.input[0], node.output[0]
        stored, scales = quantize_columns(graph.array(name).T, form)
        rows = graph.add(f"{name}_rows", stored.T)
        graph.add(f"{name}_scales", scales[:, None])
        node.input[0], node.output[0] = rows, f"{result}_row"
        graph.node("Cast", [f"{result}_row"], [f"{result}_number"], to=TensorProto.FLOAT)
        graph.node("Gather", [f"{name}_scales", node.input[1]], [f"{result}_scale"], axis=0)
        graph.node("Mul", [f"{result}_number", f"{result}_scale"], [result])


def _session(graph: Path, inputs: Sequence[QuantizedInput], form: Format) -> Any:
    """Open the quantised graph in ONNX Runtime."""
    rewrite = Rewrite(graph)
    _quantize(rewrite, inputs, form)
    return rewrite.session(fused=form.dtype == np.int8)


def _rank_by_gain(
    graph: Path, inputs: Sequence[QuantizedInput], form: Format, calibration: Calibration, cosines: NDArray[np.float32]
) -> list[int]:
    """Order the inputs by the worst text's cosine when that input alone is not rounded, the highest first.

    One session serves all: a switch for each input chooses the rounded or the float value at run time.
    """
    rewrite = Rewrite(graph)
    names = list(linear_inputs(rewrite))
    _quantize(rewrite, inputs, form)
    switches = [f"{name}_switch" for name in names]
    for name, switch, quantized in zip(names, switches, inputs, strict=True):
        value = quantized.rounded_value(name)
        for node in rewrite.nodes:
            node.input[:] = [f"{name}_chosen" if read == f"{name}_dequantized" else read for read in node.input]
        rewrite.node("Where", [switch, f"{name}_dequantized", value], [f"{name}_chosen"])
    session = rewrite.session(switches=switches, fused=form.dtype == np.int8)
    ends = np.cumsum([len(slots) for slots in calibration.slots])
    batch = int(np.searchsorted(ends, int(cosines.argmin()), side="right"))  # the worst text's
    reached = []
    for left_out in switches:
        extra = {switch: np.array(switch != left_out) for switch in switches}
        reached.append(float(calibration.cosines(session, [batch], extra).min()))
    return sorted(range(len(inputs)), key=lambda i: -reached[i])
