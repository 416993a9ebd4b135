"""Real weights: the exported MiniLM against PyTorch, through the real command."""

import numpy as np
import pytest

from encoders.reference import Reference
from encoders.source import resolve
from export.proof.proof_texts import parity_texts
from mirror_runtime import Encoder
from mirror_runtime.bundle import Layout, read_manifest
from mirror_runtime.vectors import cosines

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def test_the_manifest_states_proofs_above_their_floors(minilm_bundle):
    artifacts = read_manifest(minilm_bundle).artifacts
    assert {a.layout for a in artifacts} == set(Layout)
    for artifact in artifacts:
        assert artifact.parity.texts >= 500
        assert artifact.parity.min_cosine >= artifact.parity.floor


def test_an_encoder_of_the_bundle_gives_the_reference_vectors(minilm, minilm_bundle):
    texts = parity_texts(short=100, medium=6, long=2)
    expected = Reference.load(resolve(str(minilm))).encode(texts)
    with Encoder.load(minilm_bundle, engine="onnxruntime", precision="fp32") as encoder:
        found = encoder.encode(texts)
    assert cosines(found, expected).min() >= 0.99999
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
