"""int8 and fp8 written into a graph as QuantizeLinear and DequantizeLinear pairs, with scales found by measurement.

Weights take one scale a channel, activations one constant scale a tensor, all symmetric with zero point 0. No scale
depends on what else is in a batch, so a text's vector does not either; ONNX Runtime's dynamic int8 takes its scales
from the whole batch, and fails the proof for that. Three things make one scale a tensor enough: SmoothQuant (section 4:
an activation's channels are divided, the weights' rows multiplied) with its exponent tried layer by layer, several
columns for the few widest channels of a feed-forward layer (`export.precision.channel_splitting`), and room above
what calibration saw. A layer that still costs too much stays in float, found by letting each out in turn.

Library quantisers do not serve here: ONNX Runtime's smooths nothing, NNCF's smooths all layers by one exponent; both
leave the embedding table, half of a small encoder, in float or under one scale, and neither tells what a layer costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from export.graph.rewrite import Array, Rewrite, checked
from export.graph.trace import EXTERNAL_DATA_BYTES, Graph
from export.precision.calibration import ActivationStats, Calibration, Origin, Vectors, linear_inputs
from export.precision.channel_splitting import Columns, first_half, widen
from export.precision.half_precision import write_half
from export.proof.parity import Floors
from mirror_runtime.bundle import Precision

ROOM = 0.005
"""Layers are left in float until the worst calibration text is this far above the proof's floor."""

EXPONENTS = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
"""Of the activations' peaks in the smoothing factor; 0 smooths nothing."""

GAIN = 0.8
"""A feed-forward layer is widened where this takes its error to so small a share or less."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16: scales are fp16 where the rest of a graph is."""


@dataclass(frozen=True, kw_only=True)
class RangeMargin:
    """How far beyond what calibration saw a scale reaches. Clipping never paid: other texts' peaks cost more.

    Attributes:
        headroom: times the peak seen.
        least: the share of channels whose peaks are taken for too small, and raised to the next one's.
    """

    headroom: float
    least: float


REACHES: Mapping[Origin, RangeMargin] = {
    Origin.NORM: RangeMargin(headroom=1.2, least=0.5),
    # An average over ordinary text is smaller than the vectors, which one word over and over brings out again.
    Origin.ATTENTION: RangeMargin(headroom=2.0, least=0.5),
    # Most channels fire on few texts: one that calibration never saw firing may fire as the others do.
    Origin.ACTIVATION: RangeMargin(headroom=1.2, least=0.8),
}
"""Found on MiniLM: calibrated on docstrings, the worst of 1,000 STS-B sentences rose from cosine 0.974 to 0.990."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A quantised number format.

    Attributes:
        largest: the largest number it represents at scale 1.
        dtype: of the stored numbers.
        opset: the first that has it.
    """

    largest: float
    dtype: np.dtype[np.generic]
    opset: int


FORMATS: Mapping[Precision, Format] = {
    Precision.INT8: Format(largest=127.0, dtype=np.dtype(np.int8), opset=13),
    Precision.FP8: Format(largest=448.0, dtype=np.dtype(ml_dtypes.float8_e4m3fn), opset=19),
}


@dataclass(frozen=True, kw_only=True)
class QuantizedInput:
    """How the value that one or several linear layers read is quantised.

    Attributes:
        smoothing: float32 [channels]: the value is divided, the weights' rows are multiplied by it.
        scale: of the divided value.
        columns: that carry the value's channels.
        error: of the layers' outputs, relative, on calibration text.
        layers: those that read it, as `_layer` names them.
        quantized: False leaves these layers in float.
    """

    smoothing: Vectors
    scale: float
    columns: Columns
    error: float
    layers: frozenset[bytes] = frozenset()
    quantized: bool = True

    def rounded_value(self, name: str) -> str:
        """Name what is rounded of a value that is called `name`."""
        if self.columns.widened:
            return f"{name}_staggered"
        return f"{name}_smooth" if (self.smoothing != 1).any() else name


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a graph's linear layers are quantised; it fits the padded and the packed graph of one encoder.

    Attributes:
        precision: int8 or fp8.
        sites: by position among the packed graph's `linear_inputs`.
        worst_cosine: of the calibration texts.
    """

    precision: Precision
    sites: tuple[QuantizedInput, ...]
    worst_cosine: float


def plan_sites(graph: Path, calibration: Calibration, precision: Precision) -> Plan:
    """Choose scales and smoothing, and which layers stay in float.

    Args:
        graph: the fp32 packed ONNX file.
        calibration: of this graph.
        precision: int8 or fp8.
    """
    rewrite = Rewrite(graph)
    form = FORMATS[precision]
    sites: list[QuantizedInput] = []
    for flow, (name, nodes) in zip(calibration.flows, linear_inputs(rewrite).items(), strict=True):
        weights = np.concatenate([rewrite.array(node.input[1]) for node in nodes], axis=1)
        layers = frozenset(_layer(rewrite, node) for node in nodes)
        # Of fp8 more columns resolve no more: its steps grow with the number.
        widens = precision is Precision.INT8 and first_half(rewrite, name) is not None
        sites.append(replace(best_site(flow, weights, form, widens=widens), layers=layers))
    target = Floors.of(precision, calibration.spec).reference + ROOM
    cosines = calibration.cosines(_session(graph, sites, form))
    if cosines.min() < target:
        for at in _by_gain(graph, sites, form, calibration, cosines):
            sites[at] = replace(sites[at], quantized=False)
            cosines = calibration.cosines(_session(graph, sites, form))
            if cosines.min() >= target:
                break
    return Plan(precision=precision, sites=tuple(sites), worst_cosine=float(cosines.min()))


def best_site(flow: ActivationStats, weights: Array, form: Format, *, widens: bool = False) -> QuantizedInput:
    """Try smoothing exponents, and more columns, and take what changes the layers' outputs least.

    Args:
        flow: what the layers read.
        weights: float32 [channels, outputs].
        form: the number format.
        widens: whether the value may have more columns than channels.
    """
    plain = _best(flow, weights, form, Columns.single(flow.peak.size))
    if not widens:
        return plain
    wide = _best(flow, weights, form, Columns.spread(flow.peak))
    return wide if wide.error <= GAIN * plain.error else plain


def _best(flow: ActivationStats, weights: Array, form: Format, columns: Columns) -> QuantizedInput:
    """Find the smoothing and the scale for channels in these columns."""
    channels, stagger = columns.channels, columns.stagger
    wanted = flow.rows @ weights
    power = max(float((wanted**2).sum()), 1e-12)
    reaches = REACHES[flow.origin]
    least = max(float(np.quantile(flow.peak, reaches.least)), 1e-5)
    peak = (np.maximum(flow.peak, least) / columns.copies).astype(np.float32)
    reach = np.maximum(np.abs(weights).max(1), 1e-5)
    rows, weights = flow.rows[:, channels] / columns.copies[channels], weights[channels]

    def attempt(factor: Vectors) -> QuantizedInput:
        scale = max(float((peak / factor).max()) * reaches.headroom / form.largest, SMALLEST_SCALE)
        values = rounded(rows / factor[channels] / scale + stagger, form).astype(np.float32) * scale
        stored, scales = quantize_columns(weights * factor[channels, None], form)
        error = float((((values @ (stored.astype(np.float32) * scales)) - wanted) ** 2).sum()) / power
        smoothing = (factor * columns.copies).astype(np.float32)
        return QuantizedInput(smoothing=smoothing, scale=scale, columns=columns, error=error)

    factors = [peak**exponent for exponent in EXPONENTS]
    factors += [peak**exponent / reach ** (1 - exponent) for exponent in EXPONENTS if 0 < exponent < 1]
    evened = [(factor / np.exp(np.log(factor).mean())).astype(np.float32) for factor in factors]
    return min((attempt(factor) for factor in evened), key=lambda site: site.error)


def write_quantized_for_gpu(
    source: Graph, path: Path, plan: Plan, *, external_data_bytes: int = EXTERNAL_DATA_BYTES
) -> Graph:
    """Write a graph with its linear layers quantised and everything else in fp16, for TensorRT and CUDA.

    Raises:
        EngineError: the file breaks the contract, or fp16 cannot hold the weights.
    """
    with TemporaryDirectory(dir=path.parent) as folder:
        inner = write_quantized(
            source, Path(folder) / path.name, plan, tables=False, external_data_bytes=external_data_bytes
        )
        return write_half(
            inner, path, Precision.FP16, precision=plan.precision, external_data_bytes=external_data_bytes
        )


def write_quantized(
    source: Graph, path: Path, plan: Plan, *, tables: bool = True, external_data_bytes: int = EXTERNAL_DATA_BYTES
) -> Graph:
    """Write a graph with its linear layers quantised and everything else in fp32, for CPUs.

    Layers that read one value (query, key, value) become one product: ONNX Runtime then runs all of it in int8.

    Args:
        source: the fp32 graph.
        path: the file to write.
        plan: made for this encoder.
        tables: store embedding tables as int8 with one scale a row. TensorRT's Gather takes no int8.
        external_data_bytes: see `EXTERNAL_DATA_BYTES`.

    Raises:
        EngineError: the file breaks the contract.
    """
    graph = Rewrite(source.path)
    _quantize(graph, plan.sites, FORMATS[plan.precision])
    if tables:
        _quantize_tables(graph)
    graph.save(path, plan.precision, external_data_bytes=external_data_bytes)
    return checked(source, path)


def rounded(values: Array, form: Format) -> Array:
    """Round to the format's numbers, saturating."""
    held = np.clip(values, -form.largest, form.largest)
    return (np.rint(held) if form.dtype == np.int8 else held).astype(form.dtype)


def quantize_columns(weights: Array, form: Format) -> tuple[Array, Vectors]:
    """Quantise a matrix with one scale a column.

    Returns:
        The stored numbers, and float32 [columns].
    """
    scales = np.maximum(np.abs(weights).max(0) / form.largest, SMALLEST_SCALE).astype(np.float32)
    return rounded(weights / scales, form), scales


def _layer(graph: Rewrite, node: NodeProto) -> bytes:
    """Name a linear layer by its weights, which an encoder's padded and packed graph share."""
    name: bytes = graph.array(node.input[1])[0].tobytes()
    return name


def _reads(graph: Rewrite, sites: Sequence[QuantizedInput]) -> list[tuple[str, str, QuantizedInput, list[NodeProto]]]:
    """Bring a graph's linear layers to the sites of the packed graph.

    A value may belong to two sites: where the packed graph computes [CLS] alone in the last layer, its query reads
    another value than key and value do, and in the padded graph the same one.

    Returns:
        The value that is read, a name for what is made of it, its site, and the layers.
    """
    of_layer = {layer: at for at, site in enumerate(sites) for layer in site.layers}
    reads: list[tuple[str, str, QuantizedInput, list[NodeProto]]] = []
    for value, nodes in linear_inputs(graph).items():
        readers: dict[int, list[NodeProto]] = {}
        for node in nodes:
            readers.setdefault(of_layer[_layer(graph, node)], []).append(node)
        for nth, (at, own) in enumerate(readers.items()):
            reads.append((value, value if nth == 0 else f"{value}_{nth}", sites[at], own))
    return reads


def _quantize(graph: Rewrite, sites: Sequence[QuantizedInput], form: Format) -> None:
    graph.opset = max(graph.opset, form.opset)
    reads = [read for read in _reads(graph, sites) if read[2].quantized]
    for value, _, site, nodes in reads:
        if site.columns.widened:
            half = first_half(graph, value)
            assert half is not None  # the padded and the packed graph have the same layers
            widen(graph, half, site.columns, nodes)
    for value, name, site, nodes in reads:
        smoothing = site.smoothing[site.columns.channels]
        if (smoothing != 1).any():
            graph.node("Mul", [value, graph.add(f"{name}_smoothing", 1 / smoothing)], [f"{name}_smooth"])
            value = f"{name}_smooth"
        if site.columns.widened:
            stagger = graph.add(f"{name}_stagger", site.columns.stagger * np.float32(site.scale))
            graph.node("Add", [value, stagger], [f"{name}_staggered"])
        scale = graph.add(f"{name}_scale", np.array(site.scale, np.float32))
        zero = graph.add(f"{name}_zero", np.zeros((), form.dtype))
        graph.node("QuantizeLinear", [site.rounded_value(name), scale, zero], [f"{name}_quantized"])
        graph.node("DequantizeLinear", [f"{name}_quantized", scale, zero], [f"{name}_dequantized"])
        together = np.concatenate([graph.array(node.input[1]) for node in nodes], axis=1)
        stored, scales = quantize_columns(together * smoothing[:, None], form)
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
    """Cut one product into those of several layers, behind their biases if each has one: engines fuse one addition."""
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
    """Store the tables that rows are gathered from as int8: the row and its scale are gathered, then multiplied."""
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


def _session(graph: Path, sites: Sequence[QuantizedInput], form: Format) -> Any:
    rewrite = Rewrite(graph)
    _quantize(rewrite, sites, form)
    return rewrite.session(fused=form.dtype == np.int8)


def _by_gain(
    graph: Path, sites: Sequence[QuantizedInput], form: Format, calibration: Calibration, cosines: NDArray[np.float32]
) -> list[int]:
    """Order the sites by how much closer the worst text comes when the value of that site alone is not rounded.

    One session serves all: a switch for each site chooses the rounded or the float value at run time.
    """
    rewrite = Rewrite(graph)
    names = list(linear_inputs(rewrite))
    _quantize(rewrite, sites, form)
    switches = [f"{name}_switch" for name in names]
    for name, switch, site in zip(names, switches, sites, strict=True):
        value = site.rounded_value(name)
        for node in rewrite.nodes:
            node.input[:] = [f"{name}_chosen" if read == f"{name}_dequantized" else read for read in node.input]
        rewrite.node("Where", [switch, f"{name}_dequantized", value], [f"{name}_chosen"])
    session = rewrite.session(switches=switches, fused=form.dtype == np.int8)
    ends = np.cumsum([len(places) for places in calibration.slots])
    batch = int(np.searchsorted(ends, int(cosines.argmin()), side="right"))  # the worst text's
    gains = []
    for left_out in switches:
        extra = {switch: np.array(switch != left_out) for switch in switches}
        gains.append(float(calibration.cosines(session, [batch], extra).min()))
    return sorted(range(len(sites)), key=lambda at: -gains[at])
