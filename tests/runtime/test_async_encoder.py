"""Many callers on one event loop: no text is lost or computed twice, and no caller is affected by another's."""

import asyncio
import threading
import time

import numpy as np
import pytest

from mirror_runtime import AsyncEncoder, Encoder, EngineError, InputError, OverloadedError, TextError
from mirror_runtime.tokenizer import LONG_CHARACTERS
from tests.support.fake_bundles import EngineGate


@pytest.fixture
def encoder(gateway_bundle):
    with Encoder.load(gateway_bundle, engine="fake", streams=2) as encoder:
        yield encoder


@pytest.fixture
def gate(encoder):
    """A closed gate in front of the engine."""
    gate = EngineGate(encoder.engine)
    gate.close()
    yield gate
    gate.open()


async def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.001)


def gathered(encoder, *calls, **options):
    """Run several calls of `encode` at once and return their vectors or errors."""

    async def main():
        async with AsyncEncoder(encoder, **options) as shared:
            return await asyncio.gather(*map(shared.encode, calls), return_exceptions=True)

    return asyncio.run(main())


def test_a_hundred_callers_get_their_own_vectors_in_their_order_and_in_few_batches(encoder):
    texts = [f"text {i} {'word ' * (i % 20)}" for i in range(1000)]
    expected = encoder.encode(texts)

    async def main():
        async with AsyncEncoder(encoder) as shared:

            async def caller(start: int):
                return [(i, await shared.encode([texts[i]])) for i in range(start, 1000, 100)]

            found = await asyncio.gather(*(caller(start) for start in range(100)))
            return [pair for pairs in found for pair in pairs], shared.stats

    found, stats = asyncio.run(main())
    assert sorted(i for i, _ in found) == list(range(1000))
    for i, vectors in found:
        np.testing.assert_array_equal(vectors, expected[i : i + 1])
    assert stats.calls == stats.texts == 1000
    assert stats.batches < 100, "callers were not gathered"
    assert stats.waiting == stats.running == 0
    texts = texts[:50]
    forward, backward, nothing = gathered(encoder, texts, texts[::-1], [], max_batch_tokens=40)
    np.testing.assert_array_equal(forward, encoder.encode(texts))
    np.testing.assert_array_equal(backward, forward[::-1])
    assert nothing.shape == (0, 8)


def test_equal_texts_are_computed_once(encoder, gate):
    async def main():
        async with AsyncEncoder(encoder, max_wait_ms=0) as shared:
            calls = [asyncio.create_task(shared.encode(["same", "same"])) for _ in range(10)]
            await until(lambda: gate.runs)  # running: later callers join it all the same
            calls.append(asyncio.create_task(shared.encode(["same"])))
            await asyncio.sleep(0)
            gate.open()
            return await asyncio.gather(*calls), shared.stats

    found, stats = asyncio.run(main())
    assert encoder.stats.texts == 1
    assert stats.shared == 20
    assert stats.batches == 1
    assert all((vectors == found[0][0]).all() for vectors in found)


def test_a_full_queue_refuses_immediately_with_a_retry_after_and_loses_nothing(encoder, gate):
    async def main():
        async with AsyncEncoder(encoder, max_wait_ms=0, max_waiting=4) as shared:
            taken = [asyncio.create_task(shared.encode(["running 1"]))]
            await until(lambda: gate.runs)
            taken.append(asyncio.create_task(shared.encode(["running 2"])))
            await until(lambda: shared.stats.running == 2)
            await until(lambda: encoder.stats.texts == 2)  # counted when tokenised; the engine still holds the first
            assert not taken[0].done()
            taken.append(asyncio.create_task(shared.encode(["a", "b", "c"])))
            await until(lambda: shared.stats.waiting == 3)
            began = time.perf_counter()
            with pytest.raises(OverloadedError, match="3 texts wait and 2 more would exceed 4") as refused:
                await shared.encode(["d", "e"])
            refused_s = time.perf_counter() - began
            assert refused.value.retry_after_s == 0.5  # nothing has finished yet
            taken.append(asyncio.create_task(shared.encode(["d", "a"])))  # "a" waits already: only one more
            await until(lambda: shared.stats.waiting == 4)
            gate.open()
            await asyncio.gather(*taken)
            with pytest.raises(OverloadedError) as refused:
                await shared.encode(list("vwxyz"))
            assert refused.value.retry_after_s == 0.01  # measured, and nothing is in flight
            return refused_s, shared.stats

    refused_s, stats = asyncio.run(main())
    assert refused_s < 0.05  # it waits for nothing; the bound of 5 ms is measured on a quiet machine
    assert (stats.refused, stats.calls, stats.waiting, stats.running) == (2, 4, 0, 0)


def test_a_cancelled_callers_text_is_not_computed_unless_it_runs_or_is_shared(encoder, gate):
    async def main():
        async with AsyncEncoder(encoder, max_wait_ms=0) as shared:
            started = asyncio.create_task(shared.encode(["started"]))
            await until(lambda: gate.runs)
            behind = asyncio.create_task(shared.encode(["behind"]))
            await until(lambda: shared.stats.running == 2)
            alone = asyncio.create_task(shared.encode(["mine", "ours"]))
            other = asyncio.create_task(shared.encode(["ours"]))
            await until(lambda: shared.stats.waiting == 2)
            alone.cancel()
            started.cancel()
            await asyncio.gather(alone, started, return_exceptions=True)
            assert shared.stats.waiting == 1
            gate.open()
            found = await asyncio.gather(behind, other)
            await until(lambda: shared._load.in_flight == 0)  # "started" may end last; a dropped text would stay
            return found, shared.stats

    (_, ours), stats = asyncio.run(main())
    assert encoder.stats.texts == 3  # started, behind, ours
    assert (stats.dropped, stats.cancelled) == (1, 2)
    np.testing.assert_array_equal(ours, encoder.encode(["ours"]))


@pytest.mark.parametrize(
    ("bad", "reason"), [(None, "NoneType"), (7, "int"), ("lone \ud800", "surrogate"), ("word " * 100, "has 102 tokens")]
)
def test_a_bad_text_fails_its_caller_only(gateway_bundle, bad, reason):
    with Encoder.load(gateway_bundle, engine="fake", long_texts="error") as encoder:
        good, error, well = gathered(encoder, ["good"], ["fine", bad], ["well"])
        np.testing.assert_array_equal(np.concatenate([good, well]), encoder.encode(["good", "well"]))
    assert isinstance(error, TextError)
    assert error.index == 1
    assert reason in str(error)


def test_an_engine_failure_reaches_every_caller_of_its_batch_and_no_later_one(encoder, gate):
    gate.open()
    gate.failure = EngineError("out of cheese")
    failed = gathered(encoder, ["a"], ["b"])
    gate.failure = None
    (later,) = gathered(encoder, ["a"])
    assert [str(error) for error in failed] == ["out of cheese"] * 2
    np.testing.assert_array_equal(later, encoder.encode(["a"]))


def test_closing_finishes_accepted_calls_and_refuses_new_ones(encoder, gate):
    async def main():
        shared = AsyncEncoder(encoder, max_wait_ms=10_000)
        taken = [asyncio.create_task(shared.encode([f"text {i}"])) for i in range(20)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(shared.aclose())
        await until(lambda: gate.runs)
        with pytest.raises(EngineError, match="is closed"):
            await shared.encode(["late"])
        assert not closing.done()
        gate.open()
        await closing
        return await asyncio.gather(*taken)

    assert len(asyncio.run(main())) == 20
    assert encoder.encode(["the encoder below stays open"]).shape == (1, 8)


def test_very_long_texts_hold_up_no_others(encoder, monkeypatch):
    begin, held = encoder.begin, threading.Event()

    def slow(texts, **options):
        assert len({len(text) > LONG_CHARACTERS for text in texts}) == 1, "long and short texts share a micro-batch"
        assert len(texts[0]) <= LONG_CHARACTERS or held.wait(20)
        return begin(texts, **options)

    monkeypatch.setattr(encoder, "begin", slow)

    async def main():
        async with AsyncEncoder(encoder) as shared:
            long = ["x " * LONG_CHARACTERS, "y " * LONG_CHARACTERS, "z " * LONG_CHARACTERS, "short"]
            late = [asyncio.create_task(shared.encode(long)), asyncio.create_task(shared.encode(long[:1]))]
            for _ in range(5):
                await asyncio.wait_for(shared.encode(["a", "b"]), 10)
            late[1].cancel()
            assert not late[0].done()
            held.set()
            assert (await late[0]).shape == (4, 8)
            return shared.stats

    stats = asyncio.run(main())
    assert (stats.shared, stats.waiting, stats.running) == (1, 0, 0)


def test_mistakes_are_errors(encoder):
    async def one_string(shared):
        await shared.encode("one string")

    shared = AsyncEncoder(encoder)
    with pytest.raises(InputError, match="pass a list"):
        asyncio.run(one_string(shared))
    asyncio.run(shared.encode(["a"]))
    with pytest.raises(EngineError, match="another event loop"):
        asyncio.run(shared.encode(["a"]))
    for wrong in ({"max_wait_ms": -1}, {"max_batch_tokens": 0}, {"max_waiting": 0}):
        with pytest.raises(InputError, match="the others at least 1"):
            AsyncEncoder(encoder, **wrong)
