"""Each head in both graphs, among neighbours of all lengths, against its definition written out text by text."""

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
from encoders.source import Head, resolve
from export.graph.trace import PackedEncoder, PaddedEncoder, export_graph
from export.proof.parity import FLOORS, Floors
from mirror_runtime.bundle import Activation, Dense, Ditto, EncoderSpec, Layout, Pooling, Precision, VectorType
from mirror_runtime.packing import ShapeSet, pack
from mirror_runtime.vectors import components, cosines, dtype_of, round_vectors

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
    "mean": Head(pooling=Pooling.MEAN),
    "cls": Head(pooling=Pooling.CLS),
    "mean_padded": Head(pooling=Pooling.MEAN_PADDED),
    "max": Head(pooling=Pooling.MAX),
    "weighted_mean": Head(pooling=Pooling.WEIGHTED_MEAN),
    "last": Head(pooling=Pooling.LAST),
    "mask": Head(pooling=Pooling.MASK, template=TEMPLATE),
    "mask ahead": Head(pooling=Pooling.MASK, template='[MASK] is "{text}" .'),
    "ditto": Head(ditto=Ditto(layer=1, head=1), layers=(0, -1)),
    "first and last": Head(pooling=Pooling.MEAN, layers=(1, -1)),
    "first and last [CLS]": Head(pooling=Pooling.CLS, layers=(0, 2)),
    "an inner layer": Head(pooling=Pooling.LAST, layers=(1,)),
    "largest of an average": Head(pooling=Pooling.MAX, layers=(-2, -1)),
}
ONE_TOKEN = ("cls", "last", "mask", "mask ahead", "first and last [CLS]")


@pytest.fixture(scope="module")
def encoders(tiny_bert: Path) -> Callable[[str], Reference]:
    """Give the tiny encoder with a head of `HEADS`, not normalised."""
    return lambda name: Reference.load(resolve(str(tiny_bert), max_tokens=PAD_TO, head=HEADS[name]))


def defined(reference: Reference, text: str) -> Array:
    """Give a text's pooled vector as the papers and libraries word it, from the text alone."""
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
    with torch.inference_mode():
        out = model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.tensor([mask]),
            output_hidden_states=True,
            output_attentions=True,
        )
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
    """Pack texts as the runtime does, into rows where they meet others: inputs, and each text's place in the output."""
    pieces = reference.tokenize(texts)
    own = np.array([len(piece) for piece in pieces])
    pad_to = reference.spec.pad_to
    if pad_to is not None:
        pieces = [piece + [reference.tokenizer.pad_token_id] * (pad_to - len(piece)) for piece in pieces]
    ids, lengths = np.array([*itertools.chain(*pieces)]), np.array([len(piece) for piece in pieces])
    batches = pack(ids, lengths, ShapeSet(lengths=(64,)), own=None if pad_to is None else own)
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
    filled = [piece + [7] * (length - len(piece)) for piece in pieces]  # what lies under the padding must not matter
    mask = [[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces]
    return {
        "input_ids": np.array(filled),
        "attention_mask": np.array(mask),
        "token_type_ids": np.zeros((len(texts), length), np.int64),
    }


def torch_vectors(reference: Reference, layout: Layout, texts: Sequence[str], **options: bool) -> Array:
    with torch.inference_mode():
        if layout is Layout.PADDED:
            feed = padded_feed(reference, texts)
            return PaddedEncoder(reference, **options)(*map(torch.from_numpy, feed.values()))[-1].numpy()
        feed, slots = packed_feed(reference, texts)
        out = PackedEncoder(reference)(*map(torch.from_numpy, feed.values())).numpy()
    empty = np.delete(out.reshape(-1, out.shape[-1]), slots, axis=0)
    assert len(empty)
    assert not empty.any(), "empty slots are zeros"
    return out.reshape(-1, out.shape[-1])[slots]


def graph_vectors(reference: Reference, layout: Layout, texts: Sequence[str], folder: Path, **options: bool) -> Array:
    path = folder / f"{layout.value}.onnx"
    export_graph(reference, layout, path, **options)
    session = onnxruntime.InferenceSession(str(path))
    if layout is Layout.PADDED:
        return session.run(["sentence_embedding"], padded_feed(reference, texts))[0]
    feed, slots = packed_feed(reference, texts)
    (out,) = session.run(["embedding"], feed)
    return out.reshape(-1, out.shape[-1])[slots]


def changed(reference: Reference, layers: tuple[Any, ...] = (), **changes: Any) -> Reference:
    return dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, **changes), dense=layers)


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


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("layout", list(Layout))
def test_the_onnx_files_give_the_reference_vectors(encoders, tmp_path, layout, name):
    reference = changed(encoders(name), normalize=True)
    found = graph_vectors(reference, layout, TEXTS, tmp_path)
    np.testing.assert_allclose(found, reference.encode(TEXTS), atol=2e-5)


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_a_padded_graph_without_token_vectors_gives_the_same(encoders, tmp_path, name):
    reference = encoders(name)
    found = graph_vectors(reference, Layout.PADDED, TEXTS, tmp_path, token_vectors=False)
    np.testing.assert_allclose(found, reference.encode(TEXTS), atol=2e-5)


def products(path: Path, feed: dict[str, Array]) -> int:
    """Count the multiplications of a graph's matrix products, from the shapes that they meet when it runs."""
    proto = onnx.load(path)
    nodes = [node for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")]
    constants = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    names = list(dict.fromkeys(name for n in nodes for name in (n.input[0], n.output[0]) if name not in constants))
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = onnxruntime.InferenceSession(proto.SerializeToString()).run(names, feed)
    shapes = constants | {name: value.shape for name, value in zip(names, found, strict=True)}
    return sum(math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1] for node in nodes)


def test_with_one_token_a_text_the_last_layer_is_computed_for_no_other(encoders, tmp_path):
    counts = {}
    texts = ["cat " * 7] * 7  # a row of 64 tokens
    for name in ("cls", "mean"):
        path = tmp_path / f"{name}.onnx"
        export_graph(encoders(name), Layout.PACKED, path)
        counts[name] = products(path, packed_feed(encoders(name), texts)[0])
    # Of 64 positions 16 are left in the last of 2 layers: its query, output, feed-forward and attention products.
    width, inner, length, kept = 32, 64, 64, 16
    layer = length * (2 * width * width + 2 * width * inner) + 2 * length * length * width
    pooled = 16 * length * width
    assert counts["mean"] - counts["cls"] == pooled + layer * (length - kept) // length


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


def projected(reference: Reference, pooled: Array) -> Array:
    """Dense layers, cut and norm, written out."""
    layers: list[Any] = [layer[0] for layer in reference.dense]
    first, second = layers
    hidden = np.tanh(first.weight.numpy() @ pooled + first.bias.numpy())
    hidden = second.weight.numpy() @ hidden
    hidden = np.array([x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) for x in hidden])
    cut = hidden[: reference.spec.dim]
    return cut / np.sqrt((cut * cut).sum())


@pytest.mark.parametrize("name", ["mean", "cls"])
def test_dense_layers_then_the_cut_then_the_norm(encoders, tmp_path, name):
    reference = changed(encoders(name), dense_layers(), dense=DENSE, dim=8, normalize=True)
    expected = np.array([projected(reference, defined(reference, text)) for text in TEXTS])
    np.testing.assert_allclose(reference.encode(TEXTS), expected, atol=2e-5)
    for layout in Layout:
        np.testing.assert_allclose(torch_vectors(reference, layout, TEXTS), expected, atol=2e-5)
        np.testing.assert_allclose(graph_vectors(reference, layout, TEXTS, tmp_path), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (VectorType.FLOAT16, {}),
        (VectorType.INT8, {"int8_scale": 0.004}),
        (VectorType.BINARY, {}),
        (VectorType.BINARY, {"dim": 8}),
    ],
)
@pytest.mark.parametrize("layout", list(Layout))
def test_vector_types_are_those_of_the_runtime(encoders, tmp_path, layout, kind, changes):
    plain = changed(encoders("mean"), normalize=True, **({"dim": changes["dim"]} if "dim" in changes else {}))
    reference = changed(plain, vector_type=kind, **changes)
    found = graph_vectors(reference, layout, TEXTS, tmp_path)
    assert found.dtype == dtype_of(reference.spec)
    expected = components(round_vectors(plain.encode(TEXTS), reference.spec), reference.spec)
    values = components(found, reference.spec)
    # Where a component lies at a boundary, rounding may go either way.
    assert (values == expected).mean() > 0.95
    assert np.abs(values - expected).max() <= 1.001 * {VectorType.BINARY: 2, VectorType.INT8: 0.004}.get(kind, 5e-4)
    np.testing.assert_array_equal(torch_vectors(reference, layout, TEXTS).dtype, found.dtype)
    assert (reference.encode(TEXTS) == values).mean() > 0.95


def test_int8_is_clipped_and_bits_lie_highest_first() -> None:
    spec = EncoderSpec(
        base_model="x",
        revision=None,
        family="bert",
        pooling=Pooling.MEAN,
        normalize=False,
        max_tokens=8,
        dim=8,
        vector_type=VectorType.INT8,
        int8_scale=0.01,
    )
    values = np.array([[9.0, -9.0, 0.0, 0.012, -0.018, 0.005, 1.27, -1.27]], np.float32)
    assert round_vectors(values, spec).tolist() == [[127, -127, 0, 1, -2, 0, 127, -127]]
    bits = dataclasses.replace(spec, vector_type=VectorType.BINARY, int8_scale=None)
    assert round_vectors(values, bits).tolist() == [[0b10010110]]
    assert components(round_vectors(values, bits), bits).tolist() == [[1, -1, -1, 1, -1, 1, 1, -1]]


def test_the_floor_of_int8_allows_for_rounding_and_not_for_more():
    spec = EncoderSpec(
        base_model="x",
        revision=None,
        family="bert",
        pooling=Pooling.MEAN,
        normalize=True,
        max_tokens=8,
        dim=384,
        vector_type=VectorType.INT8,
        int8_scale=0.0016,
    )
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(500, 384))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for precision in (Precision.FP32, Precision.BF16):
        for share, within in ((0.9, True), (3.0, False)):
            noise = draw.normal(size=vectors.shape)
            noise *= math.sqrt(2 * (1 - FLOORS[precision]) * share) / np.linalg.norm(noise, axis=1, keepdims=True)
            a, b = (components(round_vectors(v.astype(np.float32), spec), spec) for v in (vectors, vectors + noise))
            assert bool(cosines(a, b).min() >= Floors.of(precision, spec).reference) is within
