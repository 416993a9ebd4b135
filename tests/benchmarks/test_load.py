"""The load generator against fakes: what it counts as time, when requests are sent, and how ends are judged."""

import asyncio
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.load import generator
from benchmarks.load.generator import Loop, Window, arrivals, recovery_time
from benchmarks.load.requests import KINDS, TEXTS_PER_REQUEST, ExpectedVectors, Kind, Request, in_turn, long_texts, mix
from benchmarks.load.targets import GatewayTarget, Outcome, Sender, TritonTarget
from mirror_runtime.bundle import EncoderSpec, Pooling, VectorType
from mirror_runtime.client.protocol import Rejected
from mirror_runtime.errors import DeadlineExceededError, OverloadedError, ServerError, TextError, UnavailableError

SPEC = EncoderSpec(
    base_model="m", revision=None, family="bert", pooling=Pooling.MEAN, normalize=True, max_tokens=64, dim=16
)
GOOD = Request(target="grpc", chosen=(3, 5))


@pytest.fixture
def expected() -> ExpectedVectors:
    vectors = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = tuple(f"text {i}" for i in range(40))
    return ExpectedVectors(texts=texts, components=vectors, floor=0.999, spec=SPEC, fingerprint="f")


class Server:
    """Answers requests in turn, `seconds` each, refuses what exceeds its `room`, and is slow after an overload."""

    def __init__(self, seconds=0.005, room=1000, slow_s=0.0):
        self.seconds, self.room, self.slow_s = seconds, room, slow_s
        self.requests: list[Request] = []
        self.waiting = self.answered = 0
        self.first_refusal = self._free_at = 0.0

    async def send(self, request, _cancel_after_s=0.0):
        self.requests.append(request)
        now = time.perf_counter()
        if self.waiting >= self.room:
            self.first_refusal = self.first_refusal or now
            return Outcome.OVERLOADED, "full"
        slow = self.first_refusal and now < self.first_refusal + self.slow_s
        self._free_at = max(now, self._free_at) + self.seconds * (3 if slow else 1)
        self.waiting += 1
        await asyncio.sleep(self._free_at - now)
        self.waiting -= 1
        self.answered += 1
        return Outcome.ANSWERED, ""


def closed(send, callers, seconds, texts=40) -> Window:
    async def run():
        return await Loop(send).closed([in_turn("grpc", 2, texts, at / callers) for at in range(callers)], seconds)

    return asyncio.run(run())


def opened(send, rate, seconds, **options) -> Window:
    async def run():
        loop = Loop(send)
        await loop.open(in_turn("grpc", 2, 40), rate=rate, seconds=seconds, seed=0, **options)
        return loop.take()

    return asyncio.run(run())


def test_a_closed_loop_goes_round_all_requests_and_counts_each():
    server = Server(seconds=0.002)
    window = closed(server.send, callers=3, seconds=0.2, texts=7)
    assert len({request.chosen for request in server.requests[:3]}) == 3  # each caller begins at another place
    assert {request.chosen for request in server.requests} == {(0, 1), (2, 3), (4, 5)}  # a lone text is left out
    assert len(window.times_ms) == window.requests == len(server.requests) - 3  # each caller's first is not counted
    assert 0.2 <= window.seconds < 0.4
    assert np.mean(window.times_ms) > 4  # three callers, one worker: each waits for the others


def test_a_closed_loop_counts_failures_without_a_time_and_ends_at_once_if_there_is_nothing_else():
    server = Server(seconds=0.001)

    async def failing(request, cancel_after_s):
        end = await server.send(request, cancel_after_s)
        return (Outcome.FAILED, "out of order") if server.answered % every == 0 else end

    every = 3
    window = closed(failing, callers=1, seconds=0.1)
    assert 0 < window.unexpected == len(server.requests) - 1 - len(window.times_ms)
    every, began = 1, time.perf_counter()
    assert closed(failing, callers=4, seconds=30).times_ms == []
    assert time.perf_counter() - began < 1
    assert window.reason == "grpc 2: out of order"

    window = closed(Server(room=2).send, callers=4, seconds=0.3)  # more callers than it accepts find its maximum
    assert 60 < window.rate <= 205
    assert window.count(Outcome.OVERLOADED) > 0


def test_arrivals_are_a_poisson_process_of_known_size_and_the_same_for_a_seed():
    moments = arrivals(2000, 2.0, seed=1)
    assert len(moments) == 4000
    assert 0 <= moments[0] < moments[-1] < 2.0
    np.testing.assert_array_equal(moments, arrivals(2000, 2.0, seed=1))
    assert not np.array_equal(moments, arrivals(2000, 2.0, seed=2))
    gaps = np.diff(moments)
    assert gaps.min() >= 0
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)  # exponential; 0 for a metronome
    assert len(arrivals(0.01, 1.0, seed=0)) == 1


def test_an_open_loop_sends_all_that_is_due_and_waits_for_the_answers():
    server = Server(seconds=0.02)  # a quarter of what is offered
    window = opened(server.send, rate=200, seconds=0.4)
    assert window.requests == len(window.times_ms) == len(window.lag_ms) == 80
    assert window.seconds > 1.2
    assert max(window.times_ms) > 800  # the last one waits behind the others
    assert np.median(window.lag_ms) < 20
    assert opened(Server(seconds=0).send, rate=5, seconds=0.3).seconds == 0.3  # not up to the last answer


def test_a_stall_is_in_the_times_of_all_requests_that_were_due_meanwhile():
    class Stalling(Server):
        async def send(self, request, cancel_after_s=0.0):
            if len(self.requests) == 20:
                time.sleep(0.3)  # the whole process, sender included
            return await super().send(request, cancel_after_s)

    window = opened(Stalling(seconds=0.0).send, rate=200, seconds=0.6)
    late = sum(ms > 50 for ms in window.times_ms)
    assert late > 30  # a closed loop would have counted one slow request
    assert sum(ms > 50 for ms in window.lag_ms) == pytest.approx(late, abs=3)
    assert max(window.times_ms) >= 290


def test_requests_beyond_the_bound_are_not_sent(monkeypatch):
    monkeypatch.setattr(generator, "MOST_UNDER_WAY", 5)
    window = opened(Server(seconds=0.2).send, rate=100, seconds=0.4)
    assert window.count(Outcome.UNSENT) > 20
    assert window.reason == "5 requests were under way"
    assert window.requests == 40


def test_an_overloaded_server_answers_what_it_can_and_has_recovered_when_it_is_fast_again(monkeypatch):
    window, slow = (
        opened(Server(seconds=0.01, room=8, slow_s=slow_s).send, rate=200, seconds=0.6, calm_ms=20)
        for slow_s in (0.0, 1.2)
    )
    refused = window.count(Outcome.OVERLOADED)
    assert refused == len(window.refused_ms)
    assert 0.15 < refused / window.requests < 0.6
    assert np.median(window.refused_ms) < 10 < np.median(window.times_ms)
    assert window.recovery_s is not None
    assert slow.recovery_s is not None
    assert window.recovery_s < 0.3 < slow.recovery_s
    monkeypatch.setattr(generator, "RECOVERY_S", 0.1)
    assert asyncio.run(recovery_time(Server(seconds=0.03).send, in_turn("grpc", 2, 40), within_ms=10)) is None


def test_windows_follow_each_other_and_an_interrupt_counts_nothing_that_was_under_way():
    async def interrupted():
        server = Server(seconds=0.001)
        loop = Loop(server.send)
        task = asyncio.ensure_future(loop.open(in_turn("grpc", 2, 40), rate=200, seconds=60, seed=0))
        await asyncio.sleep(0.2)
        first = loop.take()
        server.seconds = 30
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return first, loop.take()

    first, second = asyncio.run(interrupted())
    assert first.requests > 0
    assert second.at_s - second.seconds == pytest.approx(first.at_s)
    assert second.requests <= 3  # one may have been answered between the two


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda v: v[::-1], "2 of 3 texts (cosine below 0.999"),  # two texts' vectors swapped
        (lambda v: v[:2], "is expected"),
        (lambda v: v[:, :8], "is expected"),
        (lambda v: np.where(v == v[1, 0], np.nan, v), "not finite"),
        (lambda v: v * 2, "'text 3' cosine 1.000000, off by 1 of its length"),  # not normalised
        (lambda v: v * np.array([[1], [1], [0]], np.float32), "of its length). Worst: 'text 9'"),
        (lambda v: v, None),
        (lambda v: v + np.float32(0.001), None),
    ],
)
def test_a_wrong_vector_is_found_and_a_right_one_has_no_problem(expected, spoil, problem):
    found = expected.problem((3, 5, 9), spoil(expected.components[[3, 5, 9]]))
    assert problem in found if problem else found == ""


def test_vectors_of_bits_are_compared_as_components(expected):
    bits, signs = np.packbits(expected.components > 0, axis=-1), np.where(expected.components > 0, 1, -1)
    binary = replace(expected, spec=replace(SPEC, vector_type=VectorType.BINARY), components=signs.astype(np.float32))
    assert binary.problem((0, 1), bits[:2]) == ""
    assert "cosine below" in binary.problem((0, 1), bits[1:3])


def test_the_mix_has_every_kind_in_its_share_and_is_the_same_for_a_seed(expected):
    drawn = list(islice(mix(expected, 3, KINDS), 20_000))
    for kind, share in KINDS.items():
        assert sum(r.kind is kind for r in drawn) / len(drawn) == pytest.approx(share, rel=0.25)
    good = [r for r in drawn if r.kind is Kind.GOOD]
    for size, share in TEXTS_PER_REQUEST.items():
        assert sum(len(r.chosen) == size for r in good) / len(good) == pytest.approx(share, rel=0.15)
    assert sum(r.target == "http" for r in good) / len(good) == pytest.approx(0.5, abs=0.02)
    assert {at for r in good for at in r.chosen} == set(range(40))
    assert {len(r.chosen) for r in drawn if r.kind is Kind.CANCELLED} == {32}
    assert next(mix(expected, 3, KINDS)) == drawn[0]


def test_long_texts_reach_the_encoders_limit():
    first, again = (
        long_texts(["one two three four five", "six seven eight nine"] * 1000, 256, seed=0) for _ in range(2)
    )
    assert first == again
    assert len(first) == 101
    lengths = [len(text) for text in first]
    assert 256 < min(lengths) < 500
    assert max(lengths) > 1100


class Target(TritonTarget):
    """A target whose `answer` returns vectors or raises."""

    def __init__(self, answer):
        self.answer = answer

    async def encode(self, texts):
        return self.answer(texts)

    async def submit(self, texts):
        return self.answer(texts)


def end(expected, answer, request):
    sender = Sender({"grpc": Target(answer)}, expected.texts, expected)
    return asyncio.run(sender.send(request, 0.05))


def raising(error):
    def answer(_texts):
        raise error

    return answer


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
def test_every_failure_has_its_outcome(expected, error, outcome):
    found, reason = end(expected, raising(error), GOOD)
    assert found is outcome
    assert str(error) in reason


def test_a_bad_request_is_bad_and_must_be_refused_for_the_right_reason(expected):
    received: list[object] = []
    bad = replace(GOOD, kind=Kind.BAD)
    assert end(expected, received.append, bad)[0] is Outcome.NOT_REFUSED
    assert received == [[b"text 3", b"text 5 \xff"]]
    right = Rejected("text 1: not valid UTF-8 (byte 0xff)")
    assert end(expected, raising(right), bad)[0] is Outcome.REFUSED
    assert end(expected, raising(ServerError("broken")), bad)[0] is Outcome.FAILED
    assert end(expected, raising(Rejected("no")), bad) == (Outcome.OTHER_REFUSAL, "Rejected: no")


def test_an_answer_is_compared_with_the_expected_vectors_unless_it_is_cancelled_before(expected):
    cancelled = replace(GOOD, kind=Kind.CANCELLED)
    for request in (GOOD, cancelled):
        assert end(expected, lambda _: expected.components[[3, 5]], request) == (Outcome.ANSWERED, "")
        assert end(expected, lambda _: expected.components[[5, 3]], request)[0] is Outcome.WRONG_VECTOR
    slow = Target(None)
    slow.encode = lambda _: asyncio.sleep(5)  # type: ignore[method-assign]
    sender = Sender({"grpc": slow}, expected.texts, expected)
    assert asyncio.run(sender.send(cancelled, 0.01))[0] is Outcome.CANCELLED


def test_the_gateway_target_reads_vectors_and_names_refusals():
    replies = {"slow down": (429, "later"), "broken": (500, "oh"), "odd": (200, "not json")}

    async def embed(request):
        (text, *_) = (await request.json())["inputs"]
        status, body = replies.get(text, (200, f"[[{len(text)}, 0.5]]"))
        return web.Response(status=status, text=body)

    async def sent():
        application = web.Application()
        application.router.add_post("/embed", embed)
        async with TestServer(application) as server:
            target = GatewayTarget(f"{server.host}:{server.port}", timeout_s=5)
            np.testing.assert_array_equal(await target.encode(["zwei Häuser 🏠"]), np.array([[13, 0.5]], np.float32))
            for text, kind in (("slow down", OverloadedError), ("broken", ServerError), ("odd", ServerError)):
                with pytest.raises(kind, match=replies[text][1]):
                    await target.encode([text])
        with pytest.raises(UnavailableError, match="did not answer"):
            await target.encode(["nobody listens"])
        await target.close()

    asyncio.run(sent())
