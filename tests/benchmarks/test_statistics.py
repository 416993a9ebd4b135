from functools import partial

import numpy as np
import pytest

from benchmarks.plan import take_turns
from benchmarks.report.statistics import median, percentile, ratio_of_medians
from mirror_runtime.errors import EngineError


def test_percentiles_interpolate():
    samples = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(samples, q) for q in (0, 50, 90, 100)] == [1.0, 2.5, pytest.approx(3.7), 4.0]
    assert median([7.0]) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_the_interval_includes_the_ratio_narrows_with_samples_and_repeats():
    random = np.random.default_rng(1)
    many_a, many_b = random.normal(10, 1, 400).tolist(), random.normal(5, 0.5, 400).tolist()
    few, many = ratio_of_medians(many_a[:8], many_b[:8], seed=3), ratio_of_medians(many_a, many_b, seed=3)
    for ratio in (few, many):
        assert ratio.low < ratio.value < ratio.high
    assert many.low < 2.0 < many.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert ratio_of_medians(many_a, many_b, seed=3) == many
    steady = ratio_of_medians([6.0] * 5, [2.0] * 5)
    assert (steady.value, steady.low, steady.high) == (3.0, 3.0, 3.0)


def test_parties_are_interleaved_and_one_that_fails_is_left_out():
    turns, failed = [], []

    def turn(name, round_):
        turns.append((name, round_))
        if name == "B":
            raise EngineError("broken")

    parties = {name: partial(turn, name) for name in "AB"}
    assert take_turns(parties, 2, lambda name, error: failed.append(name), lambda name: None) == {"B"} == {*failed}
    assert turns == [("A", 0), ("B", 0), ("A", 1)]
