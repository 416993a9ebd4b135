"""What a soak sends, when, and how it judges what comes back. The server here is a fake."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import soak_load
from benchmarks.soak_load import Arrivals, Callers, End, measure_rate
from benchmarks.soak_requests import SIZES, WISHES, Expected, Mix, Request, Wish, long_texts
from benchmarks.soak_tally import Outcome, Tally
from mirror_runtime.bundle import EncoderSpec, Pooling, VectorType
from mirror_runtime.client.protocol import Rejected
from mirror_runtime.errors import (
    DeadlineExceededError,
    OverloadedError,
    ServerError,
    TextError,
    UnavailableError,
)


def spec(**more) -> EncoderSpec:
    return EncoderSpec(
        base_model="m",
        revision=None,
        family="bert",
        pooling=Pooling.MEAN,
        normalize=True,
        max_tokens=64,
        dim=16,
        **more,
    )


@pytest.fixture
def expected() -> Expected:
    vectors = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Expected(
        texts=tuple(f"text {i}" for i in range(40)),
        components=vectors,
        floor=0.999,
        spec=spec(),
        canaries=2,
        long_from=30,
    )


def test_right_vectors_have_no_problem(expected):
    chosen = (3, 1, 3, 35)
    assert expected.problem(chosen, expected.components[list(chosen)]) == ""
    nearly = expected.components[list(chosen)] + np.float32(0.001)
    assert expected.problem(chosen, nearly) == ""


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda v: v[::-1], "cosine below 0.999"),  # two texts' vectors changed places
        (lambda v: v[:2], "2 vectors for 3 texts"),
        (lambda v: v[:, :8], "is expected"),
        (lambda v: np.where(v == v[1, 0], np.nan, v), "not finite"),
        (lambda v: v * 2, "off by 1 of its length"),  # not normalised
        (lambda v: v * np.array([[1], [1], [0]], np.float32), "Worst: 'text 9' cosine 0.0"),
    ],
)
def test_a_wrong_vector_is_seen(expected, spoil, says):
    assert says in expected.problem((3, 5, 9), spoil(expected.components[[3, 5, 9]]))


def test_vectors_of_bits_are_compared_as_components(expected):
    bits = np.packbits(expected.components > 0, axis=-1)
    binary = replace(
        expected,
        spec=spec(vector_type=VectorType.BINARY),
        components=np.where(expected.components > 0, 1, -1).astype(np.float32),
    )
    assert binary.problem((0, 1), bits[:2]) == ""
    assert "cosine below" in binary.problem((0, 1), bits[1:3])


def test_the_mix_has_every_kind_in_its_share_and_is_the_same_for_a_seed(expected):
    mix = Mix(expected, seed=3)
    drawn = [mix.draw() for _ in range(20_000)]
    for wish, share in WISHES.items():
        assert sum(r.wish is wish for r in drawn) / len(drawn) == pytest.approx(share, rel=0.25)
    good = [r for r in drawn if r.wish is Wish.GOOD]
    for size, share in SIZES.items():
        assert sum(len(r.chosen) == size for r in good) / len(good) == pytest.approx(share, rel=0.15)
    assert sum(r.protocol == "http" for r in good) / len(good) == pytest.approx(0.5, abs=0.02)
    chosen = [at for r in good for at in r.chosen]
    assert sum(at >= expected.long_from for at in chosen) / len(chosen) == pytest.approx(0.05, rel=0.2)
    assert set(chosen) == set(range(40))
    assert {len(r.chosen) for r in drawn if r.wish is Wish.EMPTY} == {0}
    assert {len(r.chosen) for r in drawn if r.wish is Wish.CANCELLED} == {32}
    assert [Mix(expected, seed=3).draw() for _ in range(3)] == [drawn[0]] * 3


def test_long_texts_reach_the_encoders_limit():
    made = long_texts(["one two three four five", "six seven eight nine"], max_tokens=256, seed=0)
    lengths = [len(text) for text in made]
    assert 256 < min(lengths) < 500
    assert max(lengths) > 1100
    assert made == long_texts(["one two three four five", "six seven eight nine"], max_tokens=256, seed=0)


class Sleeping:
    """Answers every request rightly after some time; the first that comes in the stall holds up the event loop."""

    def __init__(self, seconds: float = 0.001, stalled: tuple[float, float] = (0.0, 0.0)) -> None:
        self._seconds, self._stalled = seconds, stalled
        self.began = time.monotonic()
        self.calls = self.cancelled = 0

    def clock(self) -> float:
        return time.monotonic() - self.began

    async def send(self, _request: Request, _cancel_after_s: float) -> End:
        self.calls += 1
        stalls, until = self._stalled
        if stalls <= self.clock() < until:
            time.sleep(until - self.clock())
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return End(outcome=Outcome.ANSWERED)


def arrive(callers: Sleeping, expected: Expected, rate: float, seconds: float) -> Tally:
    tally = Tally()
    asyncio.run(Arrivals(callers, Mix(expected, 0), rate, tally, 0, callers.clock).run(seconds))  # type: ignore[arg-type]
    return tally


def test_requests_arrive_at_the_rate_and_all_are_waited_for(expected):
    tally = arrive(Sleeping(), expected, rate=200, seconds=1.0)
    window = tally.close_window(1.0)
    assert 140 < window.requests < 260
    assert window.times is not None
    assert window.times.p50_ms < 60


def test_a_stall_is_in_the_times_of_all_that_were_due_meanwhile(expected):
    tally = arrive(Sleeping(stalled=(0.1, 0.8)), expected, rate=200, seconds=1.0)
    window = tally.close_window(1.0)
    assert window.times is not None
    assert window.times.p99_ms > 500
    assert window.times.p50_ms > 50  # more than half of what arrived, arrived during the stall
    assert window.sent_late_p99_ms is not None
    assert window.sent_late_p99_ms > 500  # and here it was the generator's own


def test_too_many_under_way_are_not_sent_and_said(expected, monkeypatch):
    monkeypatch.setattr(soak_load, "MOST_UNDER_WAY", 5)
    tally = arrive(Sleeping(seconds=0.4), expected, rate=100, seconds=0.5)
    outcomes = tally.close_window(1.0).outcomes
    assert outcomes["not sent"] > 20
    assert outcomes["answered"] >= 5
    assert tally.problems()[0].first_reason == "5 requests were under way"


def test_an_interrupt_cancels_what_is_under_way_and_counts_none_of_it(expected):
    async def interrupted() -> tuple[Sleeping, Tally]:
        callers, tally = Sleeping(seconds=30), Tally()
        arrivals = Arrivals(callers, Mix(expected, 0), 100, tally, 0, callers.clock)  # type: ignore[arg-type]
        task = asyncio.ensure_future(arrivals.run(60))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return callers, tally

    callers, tally = asyncio.run(interrupted())
    assert callers.cancelled > 5
    assert tally.close_window(1.0).requests == 0


class Wire:
    """What both `AsyncClient` and its transports are to the callers: `answer` makes vectors, or raises."""

    def __init__(self, answer) -> None:
        self.answer = answer

    async def encode(self, texts, batch_size):
        assert len(texts) == batch_size
        return self.answer(texts)

    async def submit(self, texts, parameters, timeout_s):
        return self.answer((texts[:, 0].tolist(), parameters))

    async def close(self) -> None:
        pass


def ends(expected: Expected, monkeypatch, answer, request: Request) -> End:
    wires = []

    def wire(*_arguments, **_options):
        wires.append(Wire(answer))
        return wires[-1]

    for name in ("AsyncClient", "AsyncGrpcTransport", "AsyncHttpTransport"):
        monkeypatch.setattr(soak_load, name, wire)

    async def send() -> End:
        async with Callers({"grpc": "a:1", "http": "a:2"}, expected, "f") as callers:
            return await callers.send(request, 0.05)

    return asyncio.run(send())


GOOD = Request(wish=Wish.GOOD, protocol="grpc", chosen=(3, 5))


def raising(error: Exception):
    def answer(_given):
        raise error

    return answer


def test_a_good_answer_is_held_against_the_expected_vectors(expected, monkeypatch):
    right = ends(expected, monkeypatch, lambda _: expected.components[[3, 5]], GOOD)
    assert right == End(outcome=Outcome.ANSWERED)
    swapped = ends(expected, monkeypatch, lambda _: expected.components[[5, 3]], GOOD)
    assert swapped.outcome is Outcome.WRONG_VECTOR
    assert "below 0.999" in swapped.reason


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OverloadedError("busy"), Outcome.OVERLOADED),
        (UnavailableError("away"), Outcome.UNAVAILABLE),
        (DeadlineExceededError("slow"), Outcome.LATE),
        (TextError(0, "bad"), Outcome.GOOD_REFUSED),
        (Rejected("bad"), Outcome.GOOD_REFUSED),
        (ServerError("broken"), Outcome.FAILED),
        (TimeoutError("a library's own"), Outcome.CRASHED),
        (ValueError("odd"), Outcome.CRASHED),
    ],
)
def test_every_failure_has_its_kind(expected, monkeypatch, error, outcome):
    end = ends(expected, monkeypatch, raising(error), GOOD)
    assert end.outcome is outcome
    assert str(error) in end.reason


def bad(wish: Wish) -> Request:
    return replace(GOOD, wish=wish, chosen=() if wish is Wish.EMPTY else (3, 5))


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        (Wish.BAD_UTF8, "text 1: not valid UTF-8 (byte 0xff)"),
        (Wish.UNKNOWN_PARAMETER, "unknown parameter 'normalise': known are dimensions, prompt, truncate"),
        (Wish.EMPTY, "anything"),
    ],
)
def test_a_bad_request_must_be_refused(expected, monkeypatch, wish, told):
    assert ends(expected, monkeypatch, raising(Rejected(told)), bad(wish)).outcome is Outcome.REFUSED
    assert ends(expected, monkeypatch, lambda _: None, bad(wish)).outcome is Outcome.NOT_REFUSED
    assert ends(expected, monkeypatch, raising(ServerError("broken")), bad(wish)).outcome is Outcome.FAILED


def test_a_refusal_must_say_what_is_wrong(expected, monkeypatch):
    end = ends(expected, monkeypatch, raising(Rejected("no")), bad(Wish.BAD_UTF8))
    assert end == End(outcome=Outcome.OTHER_REFUSAL, reason="Rejected: no")


def test_bad_requests_are_bad(expected, monkeypatch):
    sent = []

    def answer(given):
        sent.append(given)
        raise Rejected("")

    for wish in (Wish.BAD_UTF8, Wish.UNKNOWN_PARAMETER, Wish.EMPTY):
        ends(expected, monkeypatch, answer, bad(wish))
    assert sent == [
        ([b"text 3", b"text 5 \xff"], {}),
        ([b"text 3", b"text 5"], {"normalise": True}),
        ([], {}),
    ]


def test_a_cancelled_request_ends_as_that_or_as_a_good_one(expected, monkeypatch):
    async def slowly(_self, _texts, _batch_size):
        await asyncio.sleep(5)

    request = replace(GOOD, wish=Wish.CANCELLED)
    assert ends(expected, monkeypatch, lambda _: expected.components[[3, 5]], request).outcome is Outcome.ANSWERED
    monkeypatch.setattr(Wire, "encode", slowly)
    assert ends(expected, monkeypatch, None, request) == End(outcome=Outcome.CANCELLED)


def test_the_rate_is_that_of_right_answers(expected):
    class Half(Sleeping):
        async def send(self, request: Request, cancel_after_s: float) -> End:
            end = await super().send(request, cancel_after_s)
            right = len(request.chosen) == 1
            return end if right else End(outcome=Outcome.FAILED, reason="too many")

    callers, tally = Half(seconds=0.01), Tally()
    rate = asyncio.run(measure_rate(callers, Mix(expected, 0), 0.5, tally))  # type: ignore[arg-type]
    (problem,) = tally.problems()
    assert (problem.kind, problem.first_reason) == ("server error", "before the load: too many")
    measured = callers.calls - soak_load.WARM_UP_REQUESTS
    assert 0 < rate * 0.5 < measured - problem.count + 1
    assert rate * 1.5 > measured - problem.count
    assert measured > 100
