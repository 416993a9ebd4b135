"""Rank correlation, its bootstrap, and the geometry of vectors."""

import numpy as np
import pytest
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from evaluation import geometry
from evaluation.statistics import CHUNK, estimate, resample_spearman, spearman


@pytest.fixture
def pairs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    return x.round(1), (x + rng.normal(size=60)).round()  # ties on both sides


def test_spearman_is_scipys_with_ties(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    assert spearman(*pairs) == pytest.approx(stats.spearmanr(*pairs).statistic, abs=1e-12)
    assert spearman([1, 2, 2, 3], [10, 20, 30, 40]) == pytest.approx(0.9486832980505138)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_resamples_are_what_scipy_gives_for_the_drawn_pairs(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    drawn = resample_spearman(*pairs, 20, np.random.default_rng(7))
    counts = np.random.default_rng(7).multinomial(60, np.full(60, 1 / 60), size=20)
    expected = [stats.spearmanr(*(np.repeat(side, count) for side in pairs)).statistic for count in counts]
    np.testing.assert_allclose(drawn, expected, atol=1e-12)


def test_the_interval_is_that_of_theory_and_of_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=800)
    y = 0.7 * x + np.sqrt(1 - 0.49) * rng.normal(size=800)
    drawn = resample_spearman(x, y, 1000, np.random.default_rng(2))
    found = estimate(spearman(x, y), drawn)
    half = 1.96 * (1 - found.value**2) * np.sqrt((1 + found.value**2 / 2) / 797)  # Bonett and Wright
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found.low < found.value < found.high
    assert CHUNK > 1000 * 800
    monkeypatch.setattr("evaluation.statistics.CHUNK", 800 * 300)
    np.testing.assert_array_equal(resample_spearman(x, y, 1000, np.random.default_rng(2)), drawn)


def test_an_estimate_prints_with_its_interval_which_a_resample_without_order_does_not_spoil():
    with np.errstate(all="raise"):
        drawn = resample_spearman([1, 2, 3], [1, 2, 3], 500, np.random.default_rng(0))
    assert np.isnan(drawn).any()
    assert estimate(1.0, drawn).low == pytest.approx(1)

    assert str(estimate(59.6, np.array([50.0, 60.0]))) == "59.60 [50.25, 59.75]"
    assert f"{estimate(1.5, np.array([1.0, 2.0])):+}" == "+1.50 [+1.02, +1.98]"


def units(*rows: tuple[float, ...]) -> np.ndarray:
    values = np.array(rows, dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_geometry_of_known_vectors() -> None:
    square = units((1, 0), (0, 1), (-1, 0), (0, -1))
    assert geometry.anisotropy(square) == pytest.approx(-1 / 3)
    assert geometry.mean_norm(square) == pytest.approx(0)
    assert geometry.isotropy(square) == pytest.approx(1)
    expected = np.log((8 * np.exp(-4) + 4 * np.exp(-8)) / 12)
    assert geometry.uniformity(square, np.random.default_rng(0)) == pytest.approx(expected)
    assert geometry.alignment(square[:2], square[1:3]) == pytest.approx(2)
    one = units((1, 0), (1, 0), (1, 0))
    assert geometry.anisotropy(one) == pytest.approx(1)
    assert geometry.uniformity(one, np.random.default_rng(0)) == pytest.approx(0, abs=1e-6)
    assert geometry.isotropy(one) == pytest.approx(np.exp(-2), rel=1e-5)
    assert geometry.mean_norm(one + one + one) == pytest.approx(3)
    assert geometry.effective_rank(square) == pytest.approx(2)
    assert geometry.effective_rank(one) == pytest.approx(1)
    assert geometry.alignment(one, one) == 0


def test_geometry_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = units(*np.random.default_rng(3).normal(1, 1, size=(700, 12)))
    cosines = (vectors.astype(np.float64) @ vectors.T)[np.triu_indices(700, 1)]
    assert geometry.anisotropy(vectors) == pytest.approx(cosines.mean(), abs=1e-6)
    exact = np.log(np.exp(-2 * (2 - 2 * cosines)).mean())
    assert geometry.uniformity(vectors, np.random.default_rng(0)) == pytest.approx(exact, abs=1e-5)
    nearest = NearestNeighbors(n_neighbors=10, metric="cosine").fit(vectors).kneighbors(return_distance=False)
    counts = np.bincount(nearest.ravel(), minlength=700)  # of others
    assert geometry.hubness(vectors, np.random.default_rng(0)) == pytest.approx(stats.skew(counts), abs=0.01)
    values = np.linalg.svd(vectors, compute_uv=False)
    rank = np.exp(stats.entropy(values / values.sum()))
    assert geometry.effective_rank(vectors) == pytest.approx(rank, rel=1e-3)
    monkeypatch.setattr(geometry, "MAX_TEXTS", 500)
    drawn = geometry.uniformity(vectors, np.random.default_rng(0))
    assert drawn == pytest.approx(exact, abs=0.05)
    assert drawn != pytest.approx(exact, abs=1e-6)
