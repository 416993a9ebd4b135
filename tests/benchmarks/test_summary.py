import numpy as np
import pytest

from benchmarks.summary import alternate, interleave, median, percentile, ratio_of_medians, thin
from mirror_runtime.vectors import cosines


def test_percentiles_interpolate():
    samples = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(samples, q) for q in (0, 50, 90, 100)] == [1.0, 2.5, pytest.approx(3.7), 4.0]
    assert median([7.0]) == 7.0


def test_a_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_a_ratio_without_scatter_has_no_width():
    ratio = ratio_of_medians([6.0] * 5, [2.0] * 5)
    assert (ratio.value, ratio.low, ratio.high) == (3.0, 3.0, 3.0)


def test_the_interval_holds_the_ratio_narrows_with_samples_and_repeats():
    random = np.random.default_rng(1)
    many_a, many_b = random.normal(10, 1, 400).tolist(), random.normal(5, 0.5, 400).tolist()
    few, many = ratio_of_medians(many_a[:8], many_b[:8], seed=3), ratio_of_medians(many_a, many_b, seed=3)
    for ratio in (few, many):
        assert ratio.low < ratio.value < ratio.high
    assert many.low < 2.0 < many.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert ratio_of_medians(many_a, many_b, seed=3) == many


def test_parties_take_turns():
    assert list(interleave("AB", 3)) == [(0, "A"), (0, "B"), (1, "A"), (1, "B"), (2, "A"), (2, "B")]


def test_two_groups_alternate_and_lose_nobody():
    assert alternate(["a", "b", "c"], ["1"]) == ["a", "1", "b", "c"]
    assert alternate([], ["1", "2"]) == ["1", "2"]


def test_cosine_of_rows():
    a = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    b = np.array([[3, 0], [1, 0], [1, 0]], np.float32)
    np.testing.assert_allclose(cosines(a, b), [1, 2**-0.5, 0])


def test_thinning_keeps_the_shape_and_the_extremes():
    samples = np.random.default_rng(0).exponential(5.0, 40_000).tolist()
    kept = thin(samples)
    assert len(kept) == 1000
    assert (kept[0], kept[-1]) == (round(min(samples), 3), round(max(samples), 3))
    for q in (50, 90, 99):
        assert percentile(kept, q) == pytest.approx(percentile(samples, q), rel=0.02)
    assert thin([3.0, 1.0]) == (1.0, 3.0)
