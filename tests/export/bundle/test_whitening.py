"""Whitening: its effect on a corpus's vectors, and its form as one dense layer of the encoder."""

from pathlib import Path

import numpy as np
import pytest

from encoders.reference import Reference
from encoders.source import resolve
from export.bundle.head_options import HeadOptions, extend_head, fit_whitening, whiten
from mirror_runtime.bundle import Pooling, VectorType
from mirror_runtime.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = [f"{a} {b}{word}" for a in LETTERS[:13] for b in LETTERS[::3] for word in ("cat", " on the mat")]


@pytest.fixture(scope="module")
def reference(tiny_bert: Path) -> Reference:
    return Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN))


def skewed(count: int = 400, width: int = 12) -> np.ndarray:
    draw = np.random.default_rng(0)
    return (draw.normal(size=(count, width)) @ draw.normal(size=(width, width)) + 3).astype(np.float32)


@pytest.mark.parametrize("dim", [12, 5])
def test_the_covariance_becomes_the_identity_and_the_directions_of_largest_variance_are_kept(dim):
    vectors = skewed()
    fit = fit_whitening(vectors, dim)
    white = vectors @ fit.weight.T + fit.bias
    assert white.shape == (400, dim)
    np.testing.assert_allclose(white.mean(0), np.zeros(dim), atol=1e-4)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(dim), atol=1e-3)
    fit = fit_whitening(vectors, 5)
    values = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    assert fit.variance == pytest.approx(values[:5].sum() / values.sum(), rel=1e-4)
    more = fit_whitening(vectors, 6)
    np.testing.assert_allclose(np.abs(more.weight[:5]), np.abs(fit.weight), rtol=1e-3)
    assert fit_whitening(vectors, 12).variance == pytest.approx(1)


def test_bad_corpora_are_refused_with_the_cure():
    for vectors, dim, message in (
        (skewed(5), 12, "5 texts cannot determine 12 directions"),
        (skewed(), 13, "components, so it must be 1 to 12"),
        (np.repeat(skewed(200, 3), 4, axis=1), 12, "span only 3 directions"),
    ):
        with pytest.raises(InputError, match=message):
            fit_whitening(vectors, dim)


def test_an_encoder_is_whitened_by_one_dense_layer(reference):
    whitened, record = whiten(reference, TEXTS, 16)
    assert (record.texts, record.dim) == (len(TEXTS), 16)
    (dense,) = whitened.spec.dense
    assert (dense.in_features, dense.out_features, whitened.spec.dim, whitened.spec.normalize) == (32, 16, 16, True)
    white = whitened.encode_uncut(TEXTS)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(16), atol=2e-3)
    unit = white / np.linalg.norm(white, axis=1, keepdims=True)
    np.testing.assert_allclose(whitened.encode(TEXTS), unit, atol=1e-5)


def test_the_order_is_whitening_cut_type(reference):
    options = HeadOptions(whiten=tuple(TEXTS), whiten_dim=16, dim=8, vector_type=VectorType.INT8)
    made, _ = extend_head(reference, options)
    assert (made.spec.dense[0].out_features, made.spec.dim, made.spec.vector_type) == (16, 8, VectorType.INT8)
    whitened, _ = whiten(reference, TEXTS, 16)
    cut = whitened.encode(TEXTS)[:, :8]
    cut /= np.linalg.norm(cut, axis=1, keepdims=True)
    found = made.encode(TEXTS)
    scale = made.spec.int8_scale or 0
    steps = found / scale
    np.testing.assert_allclose(steps, steps.round(), atol=1e-3)
    # The scale was measured on other text, so a few components here are clipped.
    np.testing.assert_allclose(found, cut.clip(-127 * scale, 127 * scale), atol=0.51 * scale)


def test_options_that_do_not_fit_the_encoder_are_refused(reference):
    with pytest.raises(InputError, match="pass --whiten CORPUS"):
        HeadOptions(whiten_dim=4)
    with pytest.raises(InputError, match="--dim is 33: the vectors have 32"):
        extend_head(reference, HeadOptions(dim=33))
    cut, _ = extend_head(reference, HeadOptions(dim=16))
    with pytest.raises(InputError, match="cut or rounded vectors"):
        whiten(cut, TEXTS)
    bits, _ = extend_head(reference, HeadOptions(vector_type=VectorType.BINARY))
    with pytest.raises(InputError, match="cannot become int8"):
        extend_head(bits, HeadOptions(vector_type=VectorType.INT8))
