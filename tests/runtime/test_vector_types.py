"""float16, int8 and binary vectors, from the engine to files, servers and proofs."""

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import tritonclient.grpc.model_config_pb2 as triton_proto
from google.protobuf import text_format

from mirror_runtime import Encoder
from mirror_runtime.async_encoder import AsyncEncoder
from mirror_runtime.bundle import MANIFEST_FILE, Pooling, VectorType, read_manifest, write_json
from mirror_runtime.cli.main import main
from mirror_runtime.client.client import Client
from mirror_runtime.errors import BundleError, ServerError
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model.batching import EmbedRequest, EmbedResult, embed
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import render_config
from mirror_runtime.vectors import components, cosines, cut, dtype_of, round_vectors, width_of
from tests.support.echo import Echo
from tests.support.fake_bundles import encoder_spec

DIM = 16
TEXTS = ["a cat", "", "two dogs on a mat", "word " * 40]
EACH = pytest.mark.parametrize(
    ("kind", "dtype", "width", "triton"),
    [
        (VectorType.FLOAT16, np.dtype("float16"), 16, "TYPE_FP16"),
        (VectorType.INT8, np.dtype("int8"), 16, "TYPE_INT8"),
        (VectorType.BINARY, np.dtype("uint8"), 2, "TYPE_UINT8"),
    ],
)


@pytest.fixture
def typed(make_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """Write a bundle for the fake engine with vectors of a type."""

    def make(kind: VectorType, max_tokens: int = 64) -> Path:
        bundle = make_bundle(max_tokens=max_tokens, dim=DIM, name=kind.value)
        manifest = read_manifest(bundle)
        scale = 0.005 if kind is VectorType.INT8 else None
        spec = dataclasses.replace(manifest.encoder, vector_type=kind, int8_scale=scale)
        write_json(dataclasses.replace(manifest, encoder=spec), bundle / MANIFEST_FILE)
        return bundle

    return make


def encode(bundle: Path, texts: list[Any], **options: Any) -> Any:
    with Encoder.load(bundle, engine="fake", **options) as encoder:
        return encoder.encode(texts)


def test_int8_beyond_the_range_is_clipped_and_does_not_wrap_around_and_bits_lie_highest_first() -> None:
    spec = encoder_spec(vector_type=VectorType.INT8, int8_scale=0.01)
    found = round_vectors(np.array([[-9.9, -1.28, -0.014, 0.0, 0.016, 1.27, 1.28, 9.9]], np.float32), spec)
    assert found.dtype == np.int8
    assert found.tolist() == [[-127, -127, -1, 0, 2, 127, 127, 127]]
    bits = encoder_spec(vector_type=VectorType.BINARY)
    packed = round_vectors(np.array([[9.0, -9.0, 0.0, 0.012, -0.018, 0.005, 1.27, -1.27]], np.float32), bits)
    assert packed.tolist() == [[0b10010110]]
    assert components(packed, bits).tolist() == [[1, -1, -1, 1, -1, 1, 1, -1]]


@EACH
def test_vectors_are_the_rounded_floats(typed, kind, dtype, width, triton):
    bundle, plain = typed(kind), typed(VectorType.FLOAT32)
    found, floats = encode(bundle, TEXTS), encode(plain, TEXTS)
    spec = read_manifest(bundle).encoder
    assert (found.dtype, found.shape) == (dtype, (4, width))
    assert (dtype_of(spec), width_of(spec)) == (dtype, width)
    np.testing.assert_array_equal(found, round_vectors(floats, spec))
    assert cosines(components(found, spec), floats).min() > (0.7 if kind is VectorType.BINARY else 0.9995)
    assert encode(bundle, []).dtype == dtype
    with Encoder.load(bundle, engine="fake") as encoder:
        detailed = encoder.encode_detailed(["a cat", None])
        np.testing.assert_array_equal(asyncio.run(AsyncEncoder(encoder).encode(TEXTS)), found)
    assert detailed.vectors.dtype == dtype
    assert not detailed.vectors[1].any()


@EACH
def test_the_mean_of_chunks_is_taken_of_what_they_stand_for(typed, kind, dtype, width, triton):
    bundle = typed(kind, max_tokens=12)
    spec = read_manifest(bundle).encoder
    parts = components(encode(bundle, ["cat " * 10, "cat " * 10, "cat " * 5]), spec)
    mean = parts.mean(0)
    expected = round_vectors((mean / np.linalg.norm(mean))[None], spec)
    found = encode(bundle, ["dog", "cat " * 25], long_texts="chunk")
    assert (found.dtype, found.shape) == (dtype, (2, width))
    np.testing.assert_array_equal(found[1:], expected)
    np.testing.assert_array_equal(found[:1], encode(bundle, ["dog"]))


@EACH
def test_files_hold_the_vector_type(typed, tmp_path, capsys, kind, dtype, width, triton):
    bundle, source = typed(kind), tmp_path / "in.txt"
    source.write_text("".join(f"{text}\n" for text in TEXTS))
    for name in ("out.npy", "out.parquet"):
        assert main(["encode", str(bundle), str(source), "-o", str(tmp_path / name), "--engine", "fake"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["vector_type"] == kind.value
    array = np.load(tmp_path / "out.npy")
    assert (array.dtype, array.shape) == (dtype, (4, width))
    np.testing.assert_array_equal(array, encode(bundle, TEXTS))
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.schema.field("embedding").type.value_type.to_pandas_dtype() == dtype
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), dtype), array)


@EACH
def test_triton_is_told_the_type_and_the_client_returns_it(typed, monkeypatch, kind, dtype, width, triton):
    bundle = typed(kind)
    text = render_config(read_manifest(bundle), ServingOptions(engine="fake"))
    embedding = text_format.Parse(text, triton_proto.ModelConfig()).output[0]
    assert triton_proto.DataType.Name(embedding.data_type) == triton
    assert list(embedding.dims) == [width]
    with Encoder.load(bundle, engine="fake") as encoder:
        (given,) = embed(encoder, [EmbedRequest(texts=np.array([[b"a cat"]], np.object_))], LongTexts.TRUNCATE)
    assert isinstance(given, EmbedResult)
    server = Echo(data_type=triton, dtype=dtype, dim=width)
    monkeypatch.setattr("mirror_runtime.client.client.GrpcTransport", lambda *_: server)
    for vectors in (given.vectors, Client().encode(["a cat"])):
        assert (vectors.dtype, vectors.shape) == (dtype, (1, width))
    server.data_type = "TYPE_STRING"
    with pytest.raises(ServerError, match="has no output EMBEDDING"):
        Client().encode(["a cat"])


@pytest.mark.parametrize("kind", VectorType)
def test_fewer_dimensions_are_the_leading_components(typed, kind):
    with Encoder.load(typed(kind), engine="fake") as encoder:
        spec, vectors = encoder.spec, encoder.encode(["a cat", "a dog"])
    shorter = cut(vectors, 8, normalize=spec.normalize)
    assert shorter.dtype == vectors.dtype
    assert shorter.shape == (2, 1 if kind is VectorType.BINARY else 8)
    leading = components(vectors, spec)[:, :8]
    kept = np.unpackbits(shorter, axis=-1) * 2.0 - 1 if kind is VectorType.BINARY else shorter.astype(np.float64)
    assert cosines(leading, kept).min() > 0.99999
    if kind in (VectorType.FLOAT32, VectorType.FLOAT16):
        np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vector_type": VectorType.BINARY, "dim": 12}, "need a multiple of 8"),
        ({"vector_type": VectorType.INT8}, "set it for int8 only"),
        ({"int8_scale": 0.1}, "set it for int8 only"),
        ({"vector_type": VectorType.INT8, "int8_scale": 0.0}, "must be a positive number"),
        ({"vector_type": VectorType.INT8, "int8_scale": float("nan")}, "must be a positive number"),
        ({"pooling": Pooling.MASK}, "needs a template"),
    ],
)
def test_impossible_specs_are_refused(changes, problem):
    with pytest.raises(BundleError, match=problem):
        encoder_spec(**changes)
