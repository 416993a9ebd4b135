"""A bundle's graphs, and packed rows to run them on."""

from pathlib import Path

import numpy as np
import onnx

from encoders.families import FAMILIES
from export.graph.trace import Graph
from mirror_runtime.bundle import EngineName, Layout, Precision, read_manifest
from mirror_runtime.engines.onnxruntime_engine import open_session


def graph_of(bundle: Path, layout: Layout = Layout.PACKED) -> Graph:
    """Return the fp32 graph of a layout."""
    artifact = next(a for a in read_manifest(bundle).artifacts if a.layout is layout)
    return Graph(layout=layout, path=bundle / artifact.path, inputs=artifact.inputs, outputs=artifact.outputs)


def rows(vocabulary: int = 60) -> dict[str, np.ndarray]:
    """Return two rows of 16: one with three texts and 4 empty positions, one filled by a single text."""
    draw = np.random.default_rng(0)
    segments = np.array([[1] * 5 + [2] * 4 + [3] * 3 + [0] * 4, [1] * 16])
    positions = np.array([[*range(5), *range(4), *range(3), *range(4)], [*range(16)]])
    ids = draw.integers(5, vocabulary, segments.shape)
    return {"input_ids": ids, "position_ids": positions, "segment_ids": segments}


def texts_of(output: np.ndarray) -> np.ndarray:
    """Pick the four texts of `rows` from an output."""
    return output[[0, 0, 0, 1], [0, 1, 2, 0]]


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    return open_session(path, threads=1).run(["embedding"], feed)[0]


PROVEN = {
    (EngineName.ONNXRUNTIME, Layout.PADDED),
    (EngineName.ONNXRUNTIME, Layout.PACKED),
    (EngineName.OPENVINO, Layout.PACKED),
}


def check_exact(bundle: Path) -> None:
    """Check that all fp32 artifacts are there and exact, with the inputs of the family and no operators of ours."""
    manifest = read_manifest(bundle)
    exact = [artifact for artifact in manifest.artifacts if artifact.precision is Precision.FP32]
    assert {(artifact.engine, artifact.layout) for artifact in exact} >= PROVEN
    for artifact in exact:
        assert artifact.parity.min_cosine >= 0.99999
        assert artifact.parity.max_abs_diff < 1e-5
        token_types = FAMILIES[manifest.encoder.family].token_types
        names = [tensor.name for tensor in artifact.inputs]
        assert ("token_type_ids" in names) == (artifact.layout is Layout.PADDED and token_types)
        assert {entry.domain for entry in onnx.load(bundle / artifact.path).opset_import} == {""}
