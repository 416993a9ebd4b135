"""The gate in front of the model: what fits, what is refused, and when to come again."""

import threading

import pytest

from mirror_runtime.errors import OverloadedError
from mirror_runtime.triton.model.token_budget import TokenBudget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_fits_is_taken_and_the_rest_refused():
    gate = TokenBudget(100)
    gate.enter(60)
    gate.enter(40)
    with pytest.raises(OverloadedError, match="100 tokens are in flight and 1 more would exceed 100; retry after"):
        gate.enter(1)
    assert gate.in_flight == 100, "a refusal takes no room"
    gate.leave(60)
    gate.enter(60)


def test_whatever_finds_nothing_in_flight_is_taken():
    gate = TokenBudget(10)
    gate.enter(1_000_000)
    with pytest.raises(OverloadedError):
        gate.enter(1)
    gate.leave(1_000_000)
    gate.enter(1_000_000)


def test_the_hint_is_the_time_in_which_half_will_be_done():
    clock = Clock()
    gate = TokenBudget(1000, clock)
    for _ in range(20):  # 100 tokens in 0.05 s: 2000 a second
        gate.enter(100)
        clock.now += 0.05
        gate.leave(100)
        clock.now += 10.0  # a rest is no work
    gate.enter(1000)
    with pytest.raises(OverloadedError) as caught:
        gate.enter(1)
    assert caught.value.retry_after_s == pytest.approx(0.25)
    assert "retry after 250 ms" in str(caught.value)


@pytest.mark.parametrize(("seconds", "hint"), [(1e-6, 0.01), (1e6, 10.0)])
def test_the_hint_stays_within_reason(seconds, hint):
    clock = Clock()
    gate = TokenBudget(100, clock)
    gate.enter(100)
    clock.now += seconds
    gate.leave(50)
    with pytest.raises(OverloadedError) as caught:
        gate.enter(100)
    assert caught.value.retry_after_s == hint


def test_before_anything_was_measured_there_is_a_hint_too():
    gate = TokenBudget(1)
    gate.enter(1)
    with pytest.raises(OverloadedError) as caught:
        gate.enter(1)
    assert caught.value.retry_after_s == 0.5


def test_many_threads_lose_no_token():
    gate = TokenBudget(1 << 40)

    def work() -> None:
        for tokens in range(1, 2000):
            gate.enter(tokens)
            gate.leave(tokens)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gate.in_flight == 0
