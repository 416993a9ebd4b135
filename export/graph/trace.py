"""Export an encoder's padded and packed graph, with the pooling head inside, to ONNX of standard operators only."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from encoders.families import FAMILIES
from encoders.layers import BLOCKED, Pick, PositionTables, hidden_states, position_tables
from encoders.reference import Reference
from export.graph.heads import Head, Segments
from mirror_runtime.bundle import TOKENS_PER_SLOT, EncoderSpec, Layout, TensorSpec
from mirror_runtime.errors import EngineError
from mirror_runtime.vectors import dtype_of, width_of

OPSET = 18
"""Version of ai.onnx: it has LayerNormalization, and every engine and tool that reads our files supports it."""

EXTERNAL_DATA_BYTES = 2_000_000_000
"""Weights larger than this go to a file beside the graph: Protocol Buffers are limited to 2 GiB."""

TABLE_STEP = 512
"""Tables of rotary positions have a multiple of this many rows, for callers who pad beyond the longest text."""

GRAPH_FILES = {Layout.PADDED: "model.onnx", Layout.PACKED: "model_packed.onnx"}


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Names, types and dimensions of a graph's inputs and outputs, in the graph's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Graph(Signature):
    """An exported and checked ONNX file."""

    layout: Layout
    path: Path


def signature(layout: Layout, spec: EncoderSpec, width: int) -> Signature:
    """Return the inputs and outputs that a graph must have, of an encoder with token vectors of `width` components."""
    dtype, vector_width, typed = dtype_of(spec).name, width_of(spec), FAMILIES[spec.family].token_types
    names: tuple[str, ...]
    if layout is Layout.PADDED:
        batch: tuple[str, str] = ("batch_size", "sequence_length")
        names = ("input_ids", "attention_mask", "token_type_ids")[: 3 if typed else 2]
        vectors = TensorSpec(name="sentence_embedding", dtype=dtype, shape=(batch[0], vector_width))
        if spec.per_token:
            vectors = TensorSpec(name="token_embeddings", dtype=dtype, shape=(*batch, vector_width))
        tokens = TensorSpec(name="last_hidden_state", dtype="float32", shape=(*batch, width))
        return Signature(
            inputs=tuple(_int64(name, batch) for name in names),
            # Token vectors come first: sentence-transformers and OpenSearch take the first output as such.
            outputs=(tokens, vectors),
        )
    names = ("input_ids", "position_ids", "segment_ids", "token_type_ids")[: 4 if typed and spec.scores_pairs else 3]
    slots = "length" if spec.per_token else f"length // {TOKENS_PER_SLOT}"
    return Signature(
        inputs=tuple(_int64(name, ("rows", "length")) for name in names),
        outputs=(TensorSpec(name="embedding", dtype=dtype, shape=("rows", slots, vector_width)),),
    )


def padded_states(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    *,
    attentions_of: int | None = None,
    tables: PositionTables | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run `hidden_states` on rows of one text each: see `PaddedEncoder.forward`."""
    return hidden_states(
        model,
        input_ids,
        torch.arange(input_ids.shape[1])[None, :].expand_as(input_ids),
        torch.where(attention_mask.to(torch.bool)[:, None, None, :], 0.0, BLOCKED),
        token_type_ids=token_type_ids,
        attentions_of=attentions_of,
        tables=tables,
    )


def packed_states(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    *,
    padding: torch.Tensor | None = None,
    attentions_of: int | None = None,
    pick: Pick | None = None,
    tables: PositionTables | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Run `hidden_states` on rows of several texts each: see `PackedEncoder.forward`.

    `padding`, bool [rows, length], is True on padding that belongs to a text: it attends to the text, and nothing
    attends to it.
    """
    # Empty positions attend to each other, so that every position attends to something.
    visible = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if padding is not None:
        visible = visible & ~padding[:, None, None, :]
    mask = torch.where(visible, 0.0, BLOCKED)
    return hidden_states(
        model,
        input_ids,
        position_ids,
        mask,
        token_type_ids=token_type_ids,
        attentions_of=attentions_of,
        pick=pick,
        tables=tables,
    )


class Positions(nn.Module):
    """The tables of all positions that a text may have, as constants: engines would compute them in half precision.

    Disentangled ones are projected here, so that each projection of the graph reads text alone, which int8 can scale.
    """

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        positions = -(-max(reference.spec.max_tokens, reference.spec.pad_to or 0) // TABLE_STEP) * TABLE_STEP
        with torch.no_grad():
            tables = position_tables(reference.model, positions)
        self._names = tuple(tables)
        for name, parts in tables.items():
            for part, table in enumerate(parts):
                self.register_buffer(f"{name}_{part}", table.contiguous())

    def forward(self) -> PositionTables:
        """Return the tables: see `position_tables`."""
        return {name: (self.get_buffer(f"{name}_0"), self.get_buffer(f"{name}_1")) for name in self._names}


class PaddedEncoder(nn.Module):
    """One text in each row, followed by padding."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.encoder = reference.model
        self.head = Head(reference)
        self.tables = Positions(reference)
        self.pad_id: int | None = reference.tokenizer.pad_token_id

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode rows.

        For `mean_padded` the graph itself pads or cuts rows to `pad_to`, whatever their length.

        Args:
            input_ids: int64 [batch_size, sequence_length], like the others.
            attention_mask: 1 on the text's tokens, which come first.
            token_type_ids: for the families that have them.

        Returns:
            Token vectors float32 [batch_size, sequence_length, width], and text vectors [batch_size, width of the
            vector type]; for `tokens` the head's token vectors [batch_size, sequence_length, dim].
        """
        length = input_ids.shape[1]
        pad_to = self.head.spec.pad_to
        if pad_to is not None and self.pad_id is not None:
            attention_mask = _fit_columns(attention_mask, pad_to, 0)
            input_ids = torch.where(attention_mask == 0, self.pad_id, _fit_columns(input_ids, pad_to, self.pad_id))
            token_type_ids = None if token_type_ids is None else _fit_columns(token_type_ids, pad_to, 0)
        segments = self.head.counted(Segments.from_padded(attention_mask), input_ids)
        states, probabilities = padded_states(
            self.encoder,
            input_ids,
            attention_mask,
            token_type_ids,
            attentions_of=self.head.attentions_of,
            tables=self.tables(),
        )
        vectors = self.head(states, segments, pruned=False, probabilities=probabilities)
        return states[-1][:, :length], vectors if self.head.spec.per_token else vectors[:, 0]


class PackedEncoder(nn.Module):
    """Several texts in each row, with segment ids: attention stays within a segment, and each segment is pooled."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.encoder = reference.model
        self.head = Head(reference)
        self.tables = Positions(reference)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode packed rows.

        Args:
            input_ids: int64 [rows, length], like the others; any token at empty positions.
            position_ids: 0, 1, … within each text.
            segment_ids: 1, 2, … for the texts of the row, 0 at empty positions. For `mean_padded` each text takes
                `pad_to` positions, and its padding has its number negated.
            token_type_ids: 1 on the second text of a pair; None unless the encoder is a reranker.

        Returns:
            [rows, length // TOKENS_PER_SLOT, width of the vector type]; empty slots are zeros. For `tokens` [rows,
            length, width].
        """
        segments = self.head.counted(Segments.from_packed(position_ids, segment_ids), input_ids)
        padding = None
        if self.head.spec.pad_to is not None:
            padding, segment_ids = segment_ids < 0, segment_ids.abs()
        pick = self.head.token_pick(segments)
        states, probabilities = packed_states(
            self.encoder,
            input_ids,
            position_ids,
            segment_ids,
            token_type_ids,
            padding=padding,
            attentions_of=self.head.attentions_of,
            pick=pick,
            tables=self.tables(),
        )
        vectors: torch.Tensor = self.head(states, segments, pruned=pick is not None, probabilities=probabilities)
        return vectors


def export_graphs(reference: Reference, folder: Path) -> Mapping[Layout, Graph]:
    """Write the padded and the packed graph of an encoder to a folder, and check them: see `export_graph`."""
    return {layout: export_graph(reference, layout, folder / name) for layout, name in GRAPH_FILES.items()}


def export_graph(reference: Reference, layout: Layout, path: Path) -> Graph:
    """Write one graph of an encoder (fp32, in evaluation mode), with its head inside, and check the file.

    Raises:
        EngineError: PyTorch cannot translate the model, or the file breaks the contract.
    """
    config: Any = reference.model.config
    contract = signature(layout, reference.spec, config.hidden_size)
    wrapper = PaddedEncoder(reference) if layout is Layout.PADDED else PackedEncoder(reference)
    proto = _trace(wrapper.eval(), contract)
    _strip_metadata(proto)
    _name_outputs(proto, contract)
    _name_dimensions(proto, contract)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_graph(proto, path)
    check_graph(path, contract)
    return Graph(layout=layout, path=path, inputs=contract.inputs, outputs=contract.outputs)


def check_graph(path: Path, contract: Signature) -> None:
    """Check an ONNX file against the standard and the contract.

    Raises:
        EngineError: it is invalid, uses operators outside ai.onnx, or has other inputs or outputs.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"{path.name} is not a valid ONNX file: {error}") from error
    proto = onnx.load(path, load_external_data=False)
    domains = {entry.domain for entry in proto.opset_import} | {node.domain for node in proto.graph.node}
    if domains - {"", "ai.onnx"} or proto.functions:
        raise EngineError(
            f"{path.name} uses operators of {', '.join(sorted(domains - {''}))}: only ai.onnx is portable"
        )
    used = {name for node in proto.graph.node for name in node.input}
    # Relative positions come from the distance of slots, so not every encoder needs numbers of positions.
    unused = [tensor.name for tensor in contract.inputs if tensor.name not in used | {"position_ids"}]
    if unused:
        raise EngineError(f"{path.name} does not use its input {', '.join(unused)}: the translation lost it")
    found = signature_of(proto)
    if found != contract:
        raise EngineError(f"{path.name} has {found}, but the contract is {contract}")


def signature_of(proto: onnx.ModelProto) -> Signature:
    """Read the inputs and outputs of a loaded graph; weights that are listed as inputs do not count."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    return Signature(
        inputs=tuple(_tensor_spec(value) for value in proto.graph.input if value.name not in weights),
        outputs=tuple(map(_tensor_spec, proto.graph.output)),
    )


def _int64(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    return TensorSpec(name=name, dtype="int64", shape=shape)


def _fit_columns(values: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    """Pad int64 [rows, L] with `fill`, or cut it, to `length` columns."""
    return nn.functional.pad(values, (0, length), value=fill)[:, :length]


def _trace(wrapper: nn.Module, contract: Signature) -> onnx.ModelProto:
    """Translate a module whose inputs are all int64 with two dynamic dimensions."""
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # No dimension of size 0 or 1: the exporter would take that size for a constant.
    # A separate tensor for each input: the exporter merges inputs that are the same object.
    examples = tuple(torch.ones(3, 64, dtype=torch.int64) for _ in contract.inputs)
    with _quiet_exporter(), _no_cycle_search():
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
            raise EngineError(f"PyTorch cannot translate the encoder to ONNX: {error}") from error
    if program is None:
        raise EngineError("PyTorch returned no ONNX program")
    proto: onnx.ModelProto = program.model_proto
    return proto


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence messages about PyTorch's internals; everything else is still shown."""
    # The first reports torchvision's operators as missing, which no text encoder uses; the second, norms of constants.
    names = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies its own deprecated tree types.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _no_cycle_search() -> Iterator[None]:
    """Pause Python's search for reference cycles, a fifth of a trace's time (2026-11-30): nearly all objects stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _strip_metadata(proto: onnx.ModelProto) -> None:
    """Remove the exporter's metadata: it contains source paths of this machine and makes equal exports differ."""
    graph = proto.graph
    items: tuple[Any, ...] = (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer)
    for item in items:
        del item.metadata_props[:]
        item.doc_string = ""
    # Shapes of inner values would keep the dimensions' old names; every reader infers them again.
    del graph.value_info[:]


def _output(index: int) -> str:
    return f"mirror_output_{index}"


def _name_outputs(proto: onnx.ModelProto, contract: Signature) -> None:
    """Rename the outputs last, because PyTorch names an inner value `embedding` too, after its operator."""
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
    specs = {tensor.name: tensor for tensor in (*contract.inputs, *contract.outputs)}
    for value in (*graph.input, *graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, specs[value.name].shape, strict=True):
            # A fixed size in place of a dynamic one stays: `check_graph` refuses it.
            if isinstance(name, str) and not dimension.HasField("dim_value"):
                dimension.dim_param = name


def graph_files(graph: Path) -> list[Path]:
    """List a graph's file and the weights beside it: `<name>_data` of an ONNX file, `.bin` of an OpenVINO IR."""
    beside = (graph.with_name(f"{graph.name}_data"), graph.with_suffix(".bin"))
    return [graph, *(path for path in beside if path.is_file())]


def save_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph; more than `EXTERNAL_DATA_BYTES` bytes of weights go to `<path>_data` beside it."""
    beside = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > EXTERNAL_DATA_BYTES
    onnx.save_model(proto, path, save_as_external_data=beside, location=f"{path.name}_data", size_threshold=1024)


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape=shape)
