"""A batch of requests answered with one call of the encoder, how instances share the cores, and the limit of tokens."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mirror_runtime import Encoder
from mirror_runtime.client.protocol import PROBE_TEXT
from mirror_runtime.errors import InputError, OverloadedError
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model.batching import EmbedRequest, EmbedResult, Failure, FailureKind, embed
from mirror_runtime.triton.model.instances import core_share
from mirror_runtime.triton.model.request_options import RequestOptions, parse_options
from mirror_runtime.triton.model.scheduler import TokenBudget
from tests.support.fake_triton import tensor

TRUNCATE = LongTexts.TRUNCATE


def results(outcomes: list[Any]) -> list[EmbedResult]:
    assert all(isinstance(outcome, EmbedResult) for outcome in outcomes), outcomes
    return outcomes


def request_of(*texts: bytes, **options: object) -> EmbedRequest:
    return EmbedRequest(texts=tensor(*texts), options=RequestOptions(**options))  # type: ignore[arg-type]


class CountingEncoder(Encoder):
    calls = 0

    def begin(self, *arguments, **named):
        type(self).calls += 1
        return super().begin(*arguments, **named)


@pytest.fixture
def encoder(make_bundle):
    with CountingEncoder.load(make_bundle(max_tokens=16), engine="fake") as encoder:
        CountingEncoder.calls = 0
        yield encoder


def test_all_requests_share_one_call_and_get_their_own_vectors(encoder):
    batch = [request_of(b"one"), request_of("zwei Häuser".encode(), b""), request_of(b"three")]
    outcomes = results(embed(encoder, batch, TRUNCATE))
    assert encoder.calls == 1
    expected = encoder.encode(["one", "zwei Häuser", "", "three"])
    np.testing.assert_array_equal(np.concatenate([o.vectors for o in outcomes]), expected)
    assert [o.vectors.shape for o in outcomes] == [(1, 8), (2, 8), (1, 8)]
    assert [o.tokens.shape for o in outcomes] == [(1, 1), (2, 1), (1, 1)]
    assert outcomes[1].tokens.dtype == np.int32
    assert outcomes[1].truncated.dtype == np.bool_
    calls = encoder.calls
    invalid = embed(encoder, [request_of(b"\xff"), request_of(b"\xfe")], TRUNCATE)
    assert [isinstance(o, Failure) and o.kind for o in invalid] == [FailureKind.INVALID_ARG] * 2
    assert encoder.calls == calls, "without a valid request there is no call"


def test_a_vector_that_is_not_finite_fails_its_own_request_as_the_servers_fault(encoder, monkeypatch):
    run, spoilt = encoder.engine.run, encoder.encode(["b"])[0]

    def broken(rows):
        vectors = run(rows)
        vectors[(vectors == spoilt).all(axis=-1)] = np.nan
        return vectors

    monkeypatch.setattr(encoder.engine, "run", broken)
    good, failed = embed(encoder, [request_of(b"a"), request_of(b"c", b"b")], TRUNCATE)
    assert isinstance(good, EmbedResult)
    assert isinstance(failed, Failure)
    assert (failed.kind, failed.message) == (
        FailureKind.INTERNAL,
        "text 1 has a vector with NaN or infinity: run mirror verify",
    )


@pytest.mark.parametrize(
    ("raw", "policy", "reason"),
    [
        (b"\xff\xfe", TRUNCATE, "not valid UTF-8 (byte 0xff at offset 0)"),
        (b"\xed\xa0\x80", TRUNCATE, "not valid UTF-8"),
        (b"long " * 50, LongTexts.ERROR, "has 52 tokens"),
    ],
    ids=["stray byte", "encoded surrogate", "too long"],
)
def test_an_invalid_text_fails_its_own_request_only(encoder, raw, policy, reason):
    batch = [request_of(b"good"), request_of(b"fine", raw), request_of(b"other")]
    good, bad, other = embed(encoder, batch, policy)
    assert isinstance(bad, Failure)
    assert bad.kind is FailureKind.INVALID_ARG
    assert bad.message.startswith(f"text 1: {reason}")
    vectors = np.concatenate([outcome.vectors for outcome in results([good, other])])
    np.testing.assert_array_equal(vectors, encoder.encode(["good", "other"]))


def test_each_request_has_its_own_policy_for_long_texts(encoder):
    long = b"long " * 50
    batch = [
        request_of(long, long_texts=TRUNCATE),
        request_of(long, long_texts=LongTexts.ERROR),
        request_of(long),
        request_of(b"short", long_texts=LongTexts.ERROR),
    ]
    cut, rejected, chunked, short = embed(encoder, batch, LongTexts.CHUNK)
    assert isinstance(rejected, Failure)
    cut, chunked, short = results([cut, chunked, short])
    assert cut.truncated.all()
    np.testing.assert_array_equal(cut.vectors, encoder.encode([long.decode()]))
    assert not chunked.truncated.any()
    assert not np.array_equal(chunked.vectors, cut.vectors)
    np.testing.assert_array_equal(short.vectors, encoder.encode(["short"]))
    assert encoder.calls == 3, "one for the four requests, two for the comparisons"


def test_each_request_has_its_own_dimensions_and_prompt(encoder):
    batch = [request_of(b"text"), request_of(b"text", dimensions=3), request_of(b"text", prompt="query: ")]
    plain, cut, prompted = results(embed(encoder, batch, TRUNCATE))
    assert cut.vectors.shape == (1, 3)
    expected = plain.vectors[:, :3] / np.linalg.norm(plain.vectors[:, :3])
    np.testing.assert_allclose(cut.vectors, expected, rtol=1e-6)
    np.testing.assert_array_equal(prompted.vectors, encoder.encode(["query: text"]))
    assert prompted.tokens[0, 0] == plain.tokens[0, 0] + 2


def test_the_estimate_counts_tokens_to_run_and_bytes_to_tokenise():
    assert request_of(b"a" * 40, b"").estimated_tokens(64) == 12 + 2
    assert request_of(b"a" * 128_000).estimated_tokens(64) == 64 + 1000
    assert request_of(b"a" * 40, prompt="b" * 20).estimated_tokens(64) == 17


@pytest.mark.parametrize(
    ("cores", "count", "shares"), [([0, 1, 2, 3], 2, [[0, 1], [2, 3]]), ([2, 5, 7], 2, [[2], [5, 7]]), ([4], 1, [[4]])]
)
def test_instances_share_the_cores_without_overlap(cores, count, shares):
    assert [core_share(cores, number, count) for number in range(count)] == shares
    with pytest.raises(InputError, match="3 instances on 2 cores"):
        core_share([0, 1], 0, 3)


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


def test_requests_of_a_reranker_share_a_batch_each_with_its_own_query(reranker_bundle):
    with Encoder.load(reranker_bundle, engine="fake") as reranker:
        batch = [request_of(b"one", b"two", query="q"), request_of(b"one", query="other"), request_of(PROBE_TEXT)]
        first, second, probe = results(embed(reranker, batch, TRUNCATE))
        expected = reranker.encode([("q", "one"), ("q", "two"), ("other", "one")])
        assert np.array_equal(np.concatenate([first.vectors, second.vectors]), expected)
        assert probe.vectors.shape == (1, 1)
        (failure,) = embed(reranker, [request_of(b"one")], TRUNCATE)
        assert failure == Failure(
            kind=FailureKind.INVALID_ARG, message="parameter 'query' is missing: a reranker scores texts against it"
        )
        assert parse_options('{"query": "q"}', reranker.spec).query == "q"
        for parameters, problem in (('{"query": 3}', "must be a text"), ('{"query": "", "prompt": "a"}', "'prompt'")):
            with pytest.raises(InputError, match=problem):
                parse_options(parameters, reranker.spec)


def test_an_encoder_takes_no_query(encoder):
    with pytest.raises(InputError, match="is for rerankers"):
        parse_options('{"query": "q"}', encoder.spec)
