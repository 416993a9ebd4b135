"""The two graphs of an encoder, with the pooled head inside, as ONNX files of standard operators only."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from transformers import PreTrainedModel

from mirror_runtime.bundle import TOKENS_PER_SLOT, EncoderSpec, Layout, Pooling, TensorSpec
from mirror_runtime.errors import BundleError, EngineError

OPSET = 18
"""Of ai.onnx: has LayerNormalization, and every engine and tool we hand files to reads it."""

EXTERNAL_DATA_BYTES = 2_000_000_000
"""Weights larger than this lie in a file beside the graph: Protocol Buffers end at 2 GiB."""

BLOCKED = -10_000.0
"""Added to the attention scores of pairs that must not see each other. exp() of it is exactly 0 in every precision, it
is representable in fp16 and bf16 (unlike the smallest float), and unlike -inf it gives no NaN where a kernel meets a
block of blocked pairs only."""

EPSILON = 1e-12
"""Smallest norm divided by, as `torch.nn.functional.normalize` has it."""

GRAPH_FILES = {Layout.PADDED: "model.onnx", Layout.PACKED: "model_packed.onnx"}


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Names, types and dimensions of a graph's inputs and outputs, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An exported and checked ONNX file.

    Attributes:
        layout: padded or packed.
        path: the file.
        inputs: in the graph's order.
        outputs: in the graph's order.
    """

    layout: Layout
    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def signature(layout: Layout, dim: int) -> Signature:
    """Give the contract of a graph whose vectors have `dim` components."""
    if layout is Layout.PADDED:
        batch: tuple[str, str] = ("batch_size", "sequence_length")
        return Signature(
            inputs=tuple(_int64(name, batch) for name in ("input_ids", "attention_mask", "token_type_ids")),
            # Token vectors come first: sentence-transformers and OpenSearch take the first output as such.
            outputs=(_float32("last_hidden_state", (*batch, dim)), _float32("sentence_embedding", (batch[0], dim))),
        )
    return Signature(
        inputs=tuple(_int64(name, ("rows", "length")) for name in ("input_ids", "position_ids", "segment_ids")),
        outputs=(_float32("embedding", ("rows", f"length // {TOKENS_PER_SLOT}", dim)),),
    )


class PaddedEncoder(nn.Module):
    """One text a row, filled up with padding.

    Args:
        model: a BERT encoder with eager attention.
        pooling: mean or cls.
        normalize: scale to unit L2 norm.
    """

    def __init__(self, model: PreTrainedModel, pooling: Pooling, normalize: bool) -> None:
        super().__init__()
        self.encoder = model
        self.pooling = pooling
        self.normalize = normalize

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode rows.

        Args:
            input_ids: int64 [batch_size, sequence_length].
            attention_mask: int64 [batch_size, sequence_length]: 1 on the text's own tokens.
            token_type_ids: int64 [batch_size, sequence_length].

        Returns:
            Token vectors float32 [batch_size, sequence_length, dim] and text vectors float32 [batch_size, dim].
        """
        own = attention_mask.to(torch.bool)
        hidden = self.encoder(
            input_ids=input_ids,
            attention_mask=torch.where(own[:, None, None, :], 0.0, BLOCKED),
            position_ids=torch.arange(input_ids.shape[1])[None, :].expand_as(input_ids),
            token_type_ids=token_type_ids,
        ).last_hidden_state
        if self.pooling is Pooling.CLS:
            vectors = hidden[:, 0]
        else:
            weights = own[:, :, None].to(hidden.dtype)
            vectors = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return hidden, _unit(vectors) if self.normalize else vectors


class PackedEncoder(nn.Module):
    """Several texts a row, told apart by segment ids: attention stays within a segment, and each is pooled by itself.

    Args:
        model: a BERT encoder with eager attention.
        pooling: mean or cls.
        normalize: scale to unit L2 norm.
    """

    def __init__(self, model: PreTrainedModel, pooling: Pooling, normalize: bool) -> None:
        super().__init__()
        self.encoder = model
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        """Encode packed rows.

        Args:
            input_ids: int64 [rows, length].
            position_ids: int64 [rows, length]: 0, 1, … within each text.
            segment_ids: int64 [rows, length]: 0 where empty, else 1, 2, … for the texts of the row.

        Returns:
            float32 [rows, length // TOKENS_PER_SLOT, dim]; empty slots are zeros.
        """
        # Empty positions see each other, so that every position sees something.
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        hidden = self.encoder(
            input_ids=input_ids,
            attention_mask=torch.where(same, 0.0, BLOCKED),
            position_ids=position_ids,
            token_type_ids=torch.zeros_like(input_ids),
        ).last_hidden_state
        slots = torch.arange(1, input_ids.shape[1] // TOKENS_PER_SLOT + 1)
        chosen = segment_ids[:, None, :] == slots[None, :, None]
        if self.pooling is Pooling.CLS:
            vectors = (chosen & (position_ids == 0)[:, None, :]).to(hidden.dtype) @ hidden
        else:
            weights = chosen.to(hidden.dtype)
            vectors = (weights @ hidden) / weights.sum(-1, keepdim=True).clamp(min=1.0)
        return _unit(vectors) if self.normalize else vectors


def check_head(spec: EncoderSpec) -> None:
    """Refuse an encoder whose head the graphs cannot hold.

    Raises:
        BundleError: its pooling is neither mean nor cls.
    """
    if spec.pooling not in (Pooling.MEAN, Pooling.CLS):
        raise BundleError(
            f"{spec.base_model} pools with {spec.pooling.value}, which depends on padding and cannot be packed: "
            "tune it with --pooling mean or --pooling cls and export that"
        )


def export_graphs(
    model: PreTrainedModel, spec: EncoderSpec, folder: Path, *, external_data_bytes: int = EXTERNAL_DATA_BYTES
) -> Iterator[Graph]:
    """Write the padded, then the packed graph of an encoder into a folder; each is yielded once it is checked.

    Raises:
        BundleError: the graphs cannot hold this encoder's pooling.
        EngineError: PyTorch cannot translate the model, or a file breaks the contract.
    """
    check_head(spec)
    for layout, name in GRAPH_FILES.items():
        path = folder / name
        contract = export_graph(model, spec, layout, path, external_data_bytes=external_data_bytes)
        yield Graph(layout=layout, path=path, inputs=contract.inputs, outputs=contract.outputs)


def export_graph(
    model: PreTrainedModel,
    spec: EncoderSpec,
    layout: Layout,
    path: Path,
    *,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> Signature:
    """Write one graph of an encoder, with its head inside, and check the file.

    Args:
        model: fp32, in evaluation mode. Its attention implementation is changed meanwhile.
        spec: pooling and normalisation.
        layout: padded or packed.
        path: the ONNX file to write; more than `external_data_bytes` bytes of weights go to `<path>_data` beside it.
        external_data_bytes: see `EXTERNAL_DATA_BYTES`.

    Returns:
        What the file's inputs and outputs are.

    Raises:
        BundleError: the graph cannot hold this encoder's pooling.
        EngineError: PyTorch cannot translate the model, or the file breaks the contract.
    """
    check_head(spec)
    contract = signature(layout, spec.dim)
    wrapper = PaddedEncoder if layout is Layout.PADDED else PackedEncoder
    proto = _trace(wrapper(model, spec.pooling, spec.normalize).eval(), model, contract)
    _clean(proto)
    _name_outputs(proto, contract)
    _name_dimensions(proto, contract)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(proto, path, external_data_bytes)
    check_graph(path, contract)
    return contract


def check_graph(path: Path, contract: Signature) -> None:
    """Check an ONNX file against the standard and the contract.

    Raises:
        EngineError: it is invalid, uses operators outside ai.onnx, or has other inputs or outputs.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"{path.name} is no valid ONNX file: {error}") from error
    proto = onnx.load(path, load_external_data=False)
    domains = {entry.domain for entry in proto.opset_import} | {node.domain for node in proto.graph.node}
    if domains - {"", "ai.onnx"} or proto.functions:
        raise EngineError(
            f"{path.name} uses operators of {', '.join(sorted(domains - {''}))}: only ai.onnx is portable"
        )
    used = {name for node in proto.graph.node for name in node.input}
    unused = [tensor.name for tensor in contract.inputs if tensor.name not in used]
    if unused:
        raise EngineError(f"{path.name} makes no use of its input {', '.join(unused)}: the translation lost it")
    found = Signature(
        inputs=tuple(map(_tensor_spec, proto.graph.input)), outputs=tuple(map(_tensor_spec, proto.graph.output))
    )
    if found != contract:
        raise EngineError(f"{path.name} has {found} where {contract} is the contract")


def _int64(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    return TensorSpec(name=name, dtype="int64", shape=shape)


def _float32(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / (vectors * vectors).sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)


def _trace(wrapper: nn.Module, model: PreTrainedModel, contract: Signature) -> onnx.ModelProto:
    """Translate a module whose inputs are all int64 with two free dimensions."""
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # Neither 0 nor 1 a dimension, or the exporter would take the size for a constant.
    # One tensor for each input: the exporter takes the same object given twice for one input.
    examples = tuple(torch.ones(3, 64, dtype=torch.int64) for _ in contract.inputs)
    with _eager_attention(model), _quiet_exporter():
        try:
            program = torch.onnx.export(
                wrapper,
                examples,
                dynamo=True,
                dynamic_shapes=(free,) * len(contract.inputs),
                input_names=[tensor.name for tensor in contract.inputs],
                output_names=[_output(i) for i in range(len(contract.outputs))],
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise EngineError(f"PyTorch cannot translate {type(model).__name__} to ONNX: {error}") from error
    if program is None:
        raise EngineError("PyTorch gave no ONNX program")
    proto: onnx.ModelProto = program.model_proto
    return proto


@contextlib.contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Spell attention out in matrix products: engines recognise and fuse that, whatever the mask's shape."""
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep two messages about PyTorch's own inside from the user; everything else still shows."""
    # It lists torchvision's operators as missing, which no text encoder uses.
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies its own deprecated tree types.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        registry.setLevel(level)


def _clean(proto: onnx.ModelProto) -> None:
    """Remove the exporter's notes: they hold source paths of this machine and make equal exports differ."""
    graph = proto.graph
    items: tuple[Any, ...] = (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer)
    for item in items:
        del item.metadata_props[:]
        item.doc_string = ""
    # Inner shapes would keep the dimensions' old names; every reader infers them again.
    del graph.value_info[:]


def _output(index: int) -> str:
    return f"mirror_output_{index}"


def _name_outputs(proto: onnx.ModelProto, contract: Signature) -> None:
    """Give outputs their names last: PyTorch calls an inner value `embedding` too, after its operator."""
    names = {tensor.name: f"{tensor.name}_inner" for tensor in contract.outputs}
    names |= {_output(i): tensor.name for i, tensor in enumerate(contract.outputs)}
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    values: tuple[Any, ...] = (*proto.graph.initializer, *proto.graph.output)
    for value in values:
        value.name = names.get(value.name, value.name)


def _name_dimensions(proto: onnx.ModelProto, contract: Signature) -> None:
    graph = proto.graph
    wanted = {tensor.name: tensor for tensor in (*contract.inputs, *contract.outputs)}
    for value in (*graph.input, *graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, wanted[value.name].shape, strict=True):
            # A fixed size where a free one is wanted is left alone here: `check_graph` refuses it.
            if isinstance(name, str) and not dimension.HasField("dim_value"):
                dimension.dim_param = name


def _save(proto: onnx.ModelProto, path: Path, external_data_bytes: int) -> None:
    beside = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > external_data_bytes
    if beside:
        onnx.save_model(
            proto,
            path,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=f"{path.name}_data",
            size_threshold=1024,
        )
    else:
        onnx.save_model(proto, path)


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape=shape)
