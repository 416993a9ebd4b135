"""The limit of tokens in flight: accepted and rejected requests, and the measured retry-after."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from mirror_runtime.errors import OverloadedError
from mirror_runtime.triton.model.token_budget import TokenBudget


def refused(budget: TokenBudget, tokens: int) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        budget.acquire(tokens)
    return caught.value


def test_requests_that_fit_and_a_lone_one_of_any_size_are_accepted_and_others_rejected():
    budget = TokenBudget(100)
    budget.acquire(60)
    budget.acquire(40)
    assert "100 tokens are in flight and 1 more would exceed 100; retry after" in str(refused(budget, 1))
    assert budget.in_flight == 100, "a rejected request occupies nothing"
    budget.release(60)
    budget.acquire(60)
    budget = TokenBudget(10)
    budget.acquire(1_000_000)
    refused(budget, 1)
    budget.release(1_000_000)
    budget.acquire(1_000_000)


def test_retry_after_is_the_time_until_half_is_done():
    clock = SimpleNamespace(now=100.0)
    budget = TokenBudget(1000, lambda: clock.now)
    for _ in range(20):  # 100 tokens in 0.05 s: 2000 a second
        budget.acquire(100)
        clock.now += 0.05
        budget.release(100)
        clock.now += 10.0  # idle time does not count
    budget.acquire(1000)
    assert refused(budget, 1).retry_after_s == pytest.approx(0.25)
    assert "retry after 250 ms" in str(refused(budget, 1))


@pytest.mark.parametrize(("seconds", "retry_after_s"), [(1e-6, 0.01), (1e6, 10.0), (None, 0.5)])
def test_retry_after_has_bounds_and_a_default_before_anything_is_measured(seconds, retry_after_s):
    clock = SimpleNamespace(now=100.0)
    budget = TokenBudget(100, lambda: clock.now)
    budget.acquire(100)
    if seconds is not None:
        clock.now += seconds
        budget.release(50)
    assert refused(budget, 100).retry_after_s == retry_after_s


def test_many_threads_lose_no_token():
    budget = TokenBudget(1 << 40)

    def work(_: int) -> None:
        for tokens in range(1, 2000):
            budget.acquire(tokens)
            budget.release(tokens)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4
    assert budget.in_flight == 0
