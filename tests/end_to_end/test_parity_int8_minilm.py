"""Real weights in int8: the project's own graph passes the proof, a naively quantised one does not."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from encoders.reference import Reference
from encoders.source import resolve
from evaluation.sets import read_sets
from export.graph.trace import Graph
from export.precision.calibration import Calibration
from export.precision.quantize import plan_quantization, write_quantized
from export.proof import floors
from export.proof.candidate import Candidate
from export.proof.parity import Expected, prove_artifact
from export.proof.proof_texts import parity_texts
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Precision, read_manifest
from mirror_runtime.engines.onnxruntime_engine import PRECISION_KEY
from mirror_runtime.errors import ParityError
from tests.support.graphs import graph_of

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.fixture(scope="module")
def packed(minilm_bundle) -> Graph:
    return graph_of(minilm_bundle)


@pytest.fixture(scope="module")
def expected(minilm, shared) -> Expected:
    texts = parity_texts(short=80, medium=8, long=2)
    (stsb,) = read_sets(str(shared / "data/sts/stsb-test.tsv"))
    some = dataclasses.replace(stsb, first=stsb.first[:300], second=stsb.second[:300], scores=stsb.scores[:300])
    return Expected.of(Reference.load(resolve(str(minilm), max_tokens=128)), texts, [some])


@pytest.fixture
def scratch(minilm_bundle):
    """The bundle's folder of graphs, in which a test's own files are removed at its end."""
    yield minilm_bundle / "onnx"
    for path in (minilm_bundle / "onnx").glob("under_test_*"):
        path.unlink()


def test_int8_keeps_the_vectors_at_a_quarter_of_the_size(minilm_bundle, packed, expected, scratch):
    manifest = read_manifest(minilm_bundle)
    calibration = Calibration.run(packed.path, minilm_bundle, manifest.encoder)
    plan = plan_quantization(packed.path, calibration, Precision.INT8)
    assert sum(quantized.quantized for quantized in plan.inputs) >= 20  # of 24
    path = scratch / "under_test_int8.onnx"
    made = write_quantized(packed, path, plan)
    assert path.stat().st_size <= 0.30 * packed.path.stat().st_size
    for engine in (EngineName.ONNXRUNTIME, EngineName.OPENVINO):
        proof = prove_artifact(minilm_bundle, Candidate(made, engine, Precision.INT8), manifest, expected)
        assert proof.min_cosine >= 0.98
        assert proof.neighbour_cosine >= 0.999
        with Encoder.of_graph(minilm_bundle, manifest, engine, Precision.INT8, f"onnx/{path.name}") as packed_rows:
            shapes = packed_rows._shapes.one_a_row()
            alone = Encoder(manifest, packed_rows.decision, packed_rows.engine, packed_rows._tokenizer, shapes)
            texts = expected.texts[:60]
            many = alone.encode(texts)
            assert many.tobytes() == np.concatenate([alone.encode([text]) for text in texts]).tobytes()


def test_naive_dynamic_int8_is_refused_for_its_distance_and_for_batch_dependence(
    minilm_bundle, packed, expected, scratch, monkeypatch
):
    path = scratch / "under_test_dynamic.onnx"
    quantize_dynamic(packed.path, path, weight_type=QuantType.QInt8, per_channel=True)
    proto = onnx.load(path)
    proto.metadata_props.add(key=PRECISION_KEY, value=Precision.INT8.value)
    onnx.save(proto, path)
    made = dataclasses.replace(packed, path=path)
    manifest = read_manifest(minilm_bundle)
    naive = Candidate(made, EngineName.ONNXRUNTIME, Precision.INT8)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        prove_artifact(minilm_bundle, naive, manifest, expected)
    monkeypatch.setitem(floors.FLOORS, Precision.INT8, 0.9)
    with pytest.raises(ParityError, match="depend on the other texts"):
        prove_artifact(minilm_bundle, naive, manifest, expected)
