"""Every head in both layouts, with texts of several lengths in one batch, against its definition for a single text."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from encoders.pooling import make_dense
from encoders.reference import Reference
from encoders.source import HeadSpec, resolve
from export.graph import trace
from export.graph.heads import Head, Segments
from export.graph.trace import PackedEncoder, PaddedEncoder, packed_states, padded_states
from export.proof.floors import FLOORS, Floors
from export.tensorrt.checks import breaches
from export.tensorrt.view import GraphView
from mirror_runtime.bundle import Activation, Dense, Ditto, Layout, Pooling, Precision, VectorType
from mirror_runtime.packing import ShapeSet, pack
from mirror_runtime.vectors import components, cosines, dtype_of, round_vectors
from tests.support.fake_bundles import encoder_spec

Array = np.ndarray[Any, Any]

TEXTS = (
    "",
    "the cat sat on the mat.",
    "a man is playing a guitar",
    "dog",
    "a [MASK] on a mat [PAD] is 3 dogs!",
    "cat " * 9,
)
TEMPLATE = 'the: "{text}" is [MASK] .'
PAD_TO = 24

HEADS = {
    "mean": HeadSpec(pooling=Pooling.MEAN),
    "cls": HeadSpec(pooling=Pooling.CLS),
    "mean_padded": HeadSpec(pooling=Pooling.MEAN_PADDED),
    "max": HeadSpec(pooling=Pooling.MAX),
    "weighted_mean": HeadSpec(pooling=Pooling.WEIGHTED_MEAN),
    "last": HeadSpec(pooling=Pooling.LAST),
    "mask": HeadSpec(pooling=Pooling.MASK, template=TEMPLATE),
    "mask ahead": HeadSpec(pooling=Pooling.MASK, template='[MASK] is "{text}" .'),
    "ditto": HeadSpec(ditto=Ditto(layer=1, head=1), layers=(0, -1)),
    "first and last": HeadSpec(pooling=Pooling.MEAN, layers=(1, -1)),
    "first and last [CLS]": HeadSpec(pooling=Pooling.CLS, layers=(0, 2)),
    "an inner layer": HeadSpec(pooling=Pooling.LAST, layers=(1,)),
    "largest of an average": HeadSpec(pooling=Pooling.MAX, layers=(-2, -1)),
}
ONNX_HEADS = ("mean", "max", "weighted_mean", "last", "mask ahead", "ditto", "first and last [CLS]")
"""Heads with different operators. The graph of `mean_padded` pads the rows: the tests of the command export it."""


@pytest.fixture(scope="module")
def encoders(tiny_bert: Path) -> Callable[[str], Reference]:
    """Return a function that loads the tiny encoder with a head of `HEADS`, not normalised."""
    return lambda name: Reference.load(resolve(str(tiny_bert), max_tokens=PAD_TO, head=HEADS[name]))


def defined(reference: Reference, text: str) -> Array:
    """Compute a text's pooled vector as papers and libraries define it, from that text only."""
    spec: Any = reference.spec
    tokenizer: Any = reference.tokenizer
    model: Any = reference.model
    whole = (spec.template or "{text}").replace("{text}", text)
    ids = tokenizer(whole)["input_ids"]
    assert len(ids) <= PAD_TO
    length = len(ids)
    mask = [1] * length
    if spec.pooling is Pooling.MEAN_PADDED:
        ids, mask = ids + [tokenizer.pad_token_id] * (PAD_TO - length), mask + [0] * (PAD_TO - length)
    model.set_attn_implementation("eager")
    feed = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
    with torch.inference_mode():
        out = model(**feed, output_hidden_states=True, output_attentions=True)
    vectors = sum(out.hidden_states[layer][0].numpy().astype(np.float64) for layer in spec.layers) / len(spec.layers)
    if spec.pooling in (Pooling.MEAN, Pooling.MEAN_PADDED):
        return np.mean([*vectors], axis=0)
    if spec.pooling is Pooling.CLS:
        return vectors[0]
    if spec.pooling is Pooling.LAST:
        return vectors[-1]
    if spec.pooling is Pooling.MAX:
        return np.array([max(column) for column in vectors.T])
    if spec.pooling is Pooling.MASK:
        places = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
        return vectors[places[0] if spec.template.startswith("[MASK]") else places[-1]]
    if spec.pooling is Pooling.WEIGHTED_MEAN:
        return sum((i + 1) * vector for i, vector in enumerate(vectors)) / sum(range(1, length + 1))
    attention = out.attentions[spec.ditto.layer][0, spec.ditto.head].numpy()
    weights = [float(attention[i, i]) for i in range(length)]
    return sum(w * vector for w, vector in zip(weights, vectors, strict=True)) / sum(weights)


def packed_feed(reference: Reference, texts: Sequence[str]) -> tuple[dict[str, Array], Array]:
    """Pack texts as the runtime does, several in a row; return the inputs, and each text's slot in the output."""
    pieces = reference.tokenize(texts)
    unpadded = np.array([len(piece) for piece in pieces])
    pad_to = reference.spec.pad_to
    if pad_to is not None:
        pieces = [piece + [reference.tokenizer.pad_token_id] * (pad_to - len(piece)) for piece in pieces]
    ids, lengths = np.array([*itertools.chain(*pieces)]), np.array([len(piece) for piece in pieces])
    batches = pack(ids, lengths, ShapeSet(lengths=(64,)), unpadded_lengths=None if pad_to is None else unpadded)
    names = ("input_ids", "position_ids", "segment_ids")
    rows = {name: np.concatenate([getattr(batch.rows, name) for batch in batches]) for name in names}
    slots = np.zeros(len(texts), np.int64)
    before = 0
    for batch in batches:
        slots[batch.pieces] = batch.slots + before
        before += batch.rows.shape[0] * (batch.rows.shape[1] // 4)
    return rows, slots


def padded_feed(reference: Reference, texts: Sequence[str]) -> dict[str, Array]:
    pieces = reference.tokenize(texts)
    length = max(map(len, pieces))
    filled = np.array([piece + [7] * (length - len(piece)) for piece in pieces])  # no matter what is under the padding
    mask = np.array([[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces])
    return {"input_ids": filled, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}


def torch_vectors(reference: Reference, layout: Layout, texts: Sequence[str]) -> Array:
    with torch.inference_mode():
        if layout is Layout.PADDED:
            feed = padded_feed(reference, texts)
            return PaddedEncoder(reference)(*map(torch.from_numpy, feed.values()))[-1].numpy()
        feed, slots = packed_feed(reference, texts)
        out = PackedEncoder(reference)(*map(torch.from_numpy, feed.values())).numpy()
    empty = np.delete(out.reshape(-1, out.shape[-1]), slots, axis=0)
    assert len(empty)
    assert not empty.any(), "empty slots are zeros"
    return out.reshape(-1, out.shape[-1])[slots]


def changed(reference: Reference, layers: tuple[Any, ...] = (), **changes: Any) -> Reference:
    return dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, **changes), dense=layers)


DENSE = (
    Dense(in_features=32, out_features=24, bias=True, activation=Activation.TANH),
    Dense(in_features=24, out_features=16, bias=False, activation=Activation.GELU),
)


def dense_layers() -> tuple[torch.nn.Sequential, ...]:
    draw = np.random.default_rng(0)
    weights = [draw.normal(size=(d.out_features, d.in_features)) for d in DENSE]
    return tuple(
        make_dense(d, torch.tensor(w), torch.tensor(draw.normal(size=d.out_features)) if d.bias else None)
        for d, w in zip(DENSE, weights, strict=True)
    )


def with_dense(reference: Reference) -> Reference:
    return changed(reference, dense_layers(), dense=DENSE, dim=8, normalize=True)


VECTOR_TYPES: dict[str, dict[str, Any]] = {
    "float16": {"vector_type": VectorType.FLOAT16},
    "int8": {"vector_type": VectorType.INT8, "int8_scale": 0.004},
    "binary": {"vector_type": VectorType.BINARY},
    "binary of 8": {"vector_type": VectorType.BINARY, "dim": 8},
}


class AllHeads(torch.nn.Module):
    """Several heads on one encoder, so that one trace translates them all."""

    def __init__(self, references: Sequence[Reference], layout: Layout) -> None:
        super().__init__()
        self.encoder = references[0].model
        self.heads = torch.nn.ModuleList(map(Head, references))
        self.layout = layout.value

    def forward(self, ids: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.layout == Layout.PACKED.value:
            segments = Segments.from_packed(second, third)
            states, probabilities = packed_states(self.encoder, ids, second, third, attentions_of=1)
        else:
            segments = Segments.from_padded(second)
            states, probabilities = padded_states(self.encoder, ids, second, third, attentions_of=1)
        return tuple(head(states, segments, pruned=False, probabilities=probabilities) for head in self.heads)


def packed_vectors(session: Any, reference: Reference, output: str) -> Array:
    feed, slots = packed_feed(reference, TEXTS)
    (out,) = session.run([output], feed)
    return out.reshape(-1, out.shape[-1])[slots]


@pytest.fixture(scope="module", params=list(Layout))
def graph_vectors(request, encoders, tmp_path_factory) -> Callable[[Reference], Array]:
    """Return a function that runs one head of the ONNX graph with all heads on `TEXTS`."""
    layout: Layout = request.param
    references = [changed(encoders(name), normalize=True) for name in ONNX_HEADS]
    references.append(with_dense(encoders("mean")))
    references += [changed(encoders("mean"), normalize=True, **changes) for changes in VECTOR_TYPES.values()]
    contract = trace.signature(layout, references[0].spec, 32)
    contract = dataclasses.replace(contract, outputs=contract.outputs[-1:] * len(references))
    path = tmp_path_factory.mktemp("heads") / f"{layout.value}.onnx"
    onnx.save(trace._trace(AllHeads(references, layout).eval(), contract), path)
    kept = [breach for breach in breaches(GraphView.load(path)) if " is INT8" not in breach]
    assert kept == [], "TensorRT runs every head, but its graphs give no int8 vectors"
    session = onnxruntime.InferenceSession(str(path))
    names = {(ref.spec, bool(ref.dense)): f"mirror_output_{i}" for i, ref in enumerate(references)}

    def run(reference: Reference) -> Array:
        output = names[reference.spec, bool(reference.dense)]
        if layout is Layout.PADDED:
            return session.run([output], padded_feed(reference, TEXTS))[0][:, 0]
        return packed_vectors(session, reference, output)

    return run


@pytest.mark.parametrize("name", HEADS)
def test_reference_and_both_layouts_are_what_the_definition_says(encoders, name):
    reference = encoders(name)
    expected = np.array([defined(reference, text) for text in TEXTS])
    np.testing.assert_allclose(reference.encode(TEXTS), expected, atol=2e-5)
    for layout in Layout:
        np.testing.assert_allclose(torch_vectors(reference, layout, TEXTS), expected, atol=2e-5, err_msg=layout.value)
    assert len(np.unique(expected.round(3), axis=0)) == len(TEXTS), "the texts' vectors differ"


def test_no_two_heads_are_the_same_by_accident(encoders):
    vectors = {name: defined(encoders(name), TEXTS[1]) for name in HEADS}
    for (a, first), (b, second) in itertools.combinations(vectors.items(), 2):
        assert np.abs(first - second).max() > 0.01, f"{a} and {b}"


@pytest.mark.trace
@pytest.mark.parametrize("name", [*ONNX_HEADS, "dense"])
def test_onnx_computes_what_the_reference_does(encoders, graph_vectors, name):
    reference = with_dense(encoders("mean")) if name == "dense" else changed(encoders(name), normalize=True)
    np.testing.assert_allclose(graph_vectors(reference), reference.encode(TEXTS), atol=2e-5)


def products(path: Path, feed: dict[str, Array]) -> int:
    """Count the multiplications in a graph's matrix products, from the shapes at run time."""
    proto = onnx.load(path)
    nodes = [node for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")]
    constants = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    names = list(dict.fromkeys(name for n in nodes for name in (n.input[0], n.output[0]) if name not in constants))
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = onnxruntime.InferenceSession(proto.SerializeToString()).run(names, feed)
    shapes = constants | {name: value.shape for name, value in zip(names, found, strict=True)}
    return sum(math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1] for node in nodes)


@pytest.mark.trace
def test_with_one_token_per_text_the_last_layer_computes_no_others(tiny_bert, tmp_path):
    counts = {}
    texts = ["cat " * 7] * 7  # a row of 64 tokens
    for pooling in (Pooling.CLS, Pooling.MEAN):
        reference = Reference.load(resolve(str(tiny_bert), pooling=pooling))
        graph = trace.export_graph(reference, Layout.PACKED, tmp_path / f"{pooling.value}.onnx")
        counts[pooling] = products(graph.path, packed_feed(reference, texts)[0])
    # In the last of 2 layers 16 of 64 positions remain, in query, output, feed-forward and attention products.
    width, inner, length, kept = 32, 64, 64, 16
    layer = length * (2 * width * width + 2 * width * inner) + 2 * length * length * width
    pooled = 16 * length * width
    assert counts[Pooling.MEAN] - counts[Pooling.CLS] == pooled + layer * (length - kept) // length


def projected(reference: Reference, pooled: Array) -> Array:
    """Apply dense layers, cut and norm in plain numpy."""
    layers: list[Any] = [layer[0] for layer in reference.dense]
    first, second = layers
    hidden = np.tanh(first.weight.numpy() @ pooled + first.bias.numpy())
    hidden = second.weight.numpy() @ hidden
    hidden = np.array([x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) for x in hidden])
    cut = hidden[: reference.spec.dim]
    return cut / np.sqrt((cut * cut).sum())


@pytest.mark.parametrize("name", ["mean", "cls"])
def test_dense_layers_then_the_cut_then_the_norm(encoders, name):
    reference = with_dense(encoders(name))
    expected = np.array([projected(reference, defined(reference, text)) for text in TEXTS])
    np.testing.assert_allclose(reference.encode(TEXTS), expected, atol=2e-5)
    for layout in Layout:
        np.testing.assert_allclose(torch_vectors(reference, layout, TEXTS), expected, atol=2e-5)


@pytest.mark.trace
@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_vector_types_are_those_of_the_runtime(encoders, graph_vectors, name):
    plain = changed(encoders("mean"), normalize=True, dim=VECTOR_TYPES[name].get("dim", 32))
    reference = changed(plain, **VECTOR_TYPES[name])
    found = graph_vectors(reference)
    assert found.dtype == dtype_of(reference.spec)
    expected = components(round_vectors(plain.encode(TEXTS), reference.spec), reference.spec)
    values = components(found, reference.spec)
    # A component at a boundary may be rounded either way.
    assert (values == expected).mean() > 0.95
    step = {VectorType.BINARY: 2, VectorType.INT8: 0.004}.get(reference.spec.vector_type, 5e-4)
    assert np.abs(values - expected).max() <= 1.001 * step
    for layout in Layout:
        assert torch_vectors(reference, layout, TEXTS).dtype == found.dtype
    assert (reference.encode(TEXTS) == values).mean() > 0.95


def test_the_floor_of_int8_vectors_allows_for_rounding_only():
    spec = encoder_spec(dim=384, vector_type=VectorType.INT8, int8_scale=0.0016)
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(500, 384))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for precision in (Precision.FP32, Precision.BF16):
        for share, within in ((0.9, True), (3.0, False)):
            noise = draw.normal(size=vectors.shape)
            noise *= math.sqrt(2 * (1 - FLOORS[precision]) * share) / np.linalg.norm(noise, axis=1, keepdims=True)
            a, b = (components(round_vectors(v.astype(np.float32), spec), spec) for v in (vectors, vectors + noise))
            assert bool(cosines(a, b).min() >= Floors.of(precision, spec).reference) is within
