import numpy as np
import pytest

from benchmarks.plan import interleave
from benchmarks.report.statistics import median, percentile, ratio_of_medians


def test_percentiles_interpolate():
    samples = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(samples, q) for q in (0, 50, 90, 100)] == [1.0, 2.5, pytest.approx(3.7), 4.0]
    assert median([7.0]) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_a_ratio_without_scatter_has_no_width():
    ratio = ratio_of_medians([6.0] * 5, [2.0] * 5)
    assert (ratio.value, ratio.low, ratio.high) == (3.0, 3.0, 3.0)


def test_the_interval_includes_the_ratio_narrows_with_samples_and_repeats():
    random = np.random.default_rng(1)
    many_a, many_b = random.normal(10, 1, 400).tolist(), random.normal(5, 0.5, 400).tolist()
    few, many = ratio_of_medians(many_a[:8], many_b[:8], seed=3), ratio_of_medians(many_a, many_b, seed=3)
    for ratio in (few, many):
        assert ratio.low < ratio.value < ratio.high
    assert many.low < 2.0 < many.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert ratio_of_medians(many_a, many_b, seed=3) == many


def test_parties_are_interleaved():
    assert list(interleave("AB", 3)) == [(0, "A"), (0, "B"), (1, "A"), (1, "B"), (2, "A"), (2, "B")]
