"""The vector cache: the same answers as without it, within its memory, for every caller."""

import asyncio
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.pair import main as pair
from mirror_runtime import AsyncEncoder, Encoder, InputError, VectorCache
from mirror_runtime.bundle import MANIFEST_FILE, EngineName, Precision, read_manifest, write_json
from mirror_runtime.vector_cache import ENTRY_BYTES
from tests.support.fake_bundles import FINGERPRINT, EngineGate, artifact, write_fake_bundle
from tests.support.gateways import running

DIM = 8
ENTRY = ENTRY_BYTES + 4 * DIM + 8 + 1
LONG = " ".join(["word"] * 90)
ITEMS = st.sampled_from(
    ["", "a", "b", "a b", "find: a", "1,a", "é", LONG, f"{LONG} {LONG}", None, "\ud800", ("a",), [1]]
)
PROMPTS = (None, "query")


@pytest.fixture(scope="module")
def encoders(minilm, tmp_path_factory):
    """Pairs of encoders with and without a cache of six entries, which all share; each option has its own vectors."""
    folder, cache = tmp_path_factory.mktemp("cached"), VectorCache(6 * ENTRY)
    proven = (artifact(EngineName.ONNXRUNTIME, Precision.FP32),)
    for name, of in {"one": None, "other": None, "twin": FINGERPRINT}.items():
        write_fake_bundle(minilm, folder / name, artifacts=proven, twin_of=of)
        if name != "one":
            manifest = read_manifest(folder / name)
            write_json(replace(manifest, fingerprint=f"{name:0<16}"), folder / name / MANIFEST_FILE)
    assert pair([str(folder / "one"), str(folder / "twin")]) == 0
    variants: list[dict[str, Any]] = [
        {},
        {"bundle": "other"},
        {"precision": "bf16"},
        {"long_texts": "chunk"},
        {"long_texts": "error"},
        {"invariant": True},
        {"speed": "fast"},
    ]
    pairs = []
    for salt, variant in enumerate(variants):
        found = []
        for one in (cache, None):
            options = {"engine": "fake", "vector_cache": one, **variant}
            bundle, speed = folder / options.pop("bundle", "one"), options.pop("speed", "full")
            encoder = Encoder.load(bundle, **options).at(speed)
            encoder.prompts = {"query": "find: "}
            engine: Any = encoder.engine
            engine.run = lambda rows, run=engine.run, salt=salt: run(rows) + np.float32(salt)
            found.append(encoder)
        pairs.append(tuple(found))
    return cache, pairs


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.lists(ITEMS, max_size=5), st.booleans()), min_size=1, max_size=6))
def test_no_call_gets_another_answer_than_without_the_cache(encoders, calls):
    cache, pairs = encoders

    async def shared(encoder, texts):
        async with AsyncEncoder(encoder, max_wait_ms=0) as callers:
            return await callers.encode_detailed(texts)

    for which, texts, together in (call for call in calls for _ in range(2)):  # the second time from the cache
        cached, plain = pairs[which]
        expected = plain.encode_detailed(texts)
        found = asyncio.run(shared(cached, texts)) if together else cached.encode_detailed(iter(texts))
        for name in ("vectors", "tokens", "truncated"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert {i: str(error) for i, error in found.errors.items()} == {
            i: str(error) for i, error in expected.errors.items()
        }
        found.vectors[:] = 7  # the caller's own
        assert cache.stats.bytes == cache.stats.entries * ENTRY <= cache.max_bytes
    for prompt in PROMPTS:
        np.testing.assert_array_equal(*(encoder.encode(["a", "find: a"], prompt_name=prompt) for encoder in pairs[0]))


def test_a_text_that_comes_again_is_not_computed_and_the_one_unused_for_longest_goes_first(make_bundle):
    cache = VectorCache(2 * ENTRY)
    with Encoder.load(make_bundle(), engine="fake", vector_cache=cache) as encoder:
        gate = EngineGate(encoder.engine)
        for text, runs in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4)):
            encoder.encode([text])
            assert gate.runs == runs, text
        encoder.encode(["d", "d"])
        assert (encoder.stats.texts, gate.runs, cache.stats.entries) == (6, 5, 2)
        assert (cache.stats.hits, cache.stats.misses) == (2, 6)
    with pytest.raises(Exception, match="closed"):
        encoder.encode(["d"])


def test_a_reranker_does_not_confuse_pairs(reranker_bundle):
    pairs: list[Any] = [("1,a", "b"), ("1", "a,b"), ("a", "b"), ("ab", ""), ["a", "b"]]
    with Encoder.load(reranker_bundle, engine="fake") as plain:
        expected = plain.encode(pairs)
    cache = VectorCache(10_000)
    with Encoder.load(reranker_bundle, engine="fake", vector_cache=cache) as encoder:
        for pair in pairs:
            encoder.encode([pair])
        np.testing.assert_array_equal(encoder.encode(pairs), expected)
        assert list(encoder.encode_detailed(["ab"]).errors) == [0]
    assert cache.stats.entries == len(set(map(tuple, pairs)))


def test_threads_share_it(make_bundle):
    texts = [f"text {i % 40}" for i in range(400)]
    bundle = make_bundle()
    with Encoder.load(bundle, engine="fake") as plain:
        expected = plain.encode(texts)
    cache = VectorCache(20 * ENTRY)
    with Encoder.load(bundle, engine="fake", vector_cache=cache) as encoder, ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: encoder.encode(texts[at : at + 5]), range(0, 400, 5)))
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert cache.stats.entries == 20
    assert cache.stats.hits + cache.stats.misses == 400


def test_it_takes_no_more_memory_than_it_may():
    """A million texts have been measured by hand, see docs/log.md."""
    cache = VectorCache(8_000_000)
    tracemalloc.start()
    for i in range(12_000):
        cache.keep({b"%024d" % i: bytes(1545)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cache.stats.bytes > 0.99 * cache.max_bytes
    assert peak < cache.max_bytes
    assert cache.find([b"%024d" % 11_999, b"%024d" % 0]) == [bytes(1545), None]


def test_a_size_that_holds_nothing_is_refused(make_bundle):
    with pytest.raises(InputError, match="max_bytes is 0"):
        VectorCache(0)
    with pytest.raises(InputError, match=f"of 100 bytes holds not one vector of this encoder: an entry takes {ENTRY}"):
        Encoder.load(make_bundle(), engine="fake", vector_cache=VectorCache(100))


def test_a_gateway_answers_from_it_without_an_engine_and_counts(gateway_bundle):
    long = "word " * 100
    with running(
        gateway_bundle, dimensions=(4,), max_batch=2, max_in_flight=2, vector_cache=VectorCache(5000)
    ) as gateway:
        gate = EngineGate(gateway.encoder.engine)
        first = gateway.embed(["a", long])
        cut = gateway.embed(["a"], dimensions=4).json["data"][0]["embedding"]
        assert len(cut) == 4
        gate.failure = RuntimeError("no engine")  # what is in the cache needs none
        again = gateway.embed(["a", long])
        assert again.json == first.json
        assert again.headers["x-truncated"] == "1"
        assert again.headers["x-vector-space"] == first.headers["x-vector-space"]
        assert gateway.send("POST", "/embed", {"inputs": [long], "truncate": False}).status == 413
        assert gateway.embed(["b"]).status == 500
        counted = [gateway.metric(f"mirror_gateway_cache_{name}") for name in ("hits_total", "misses_total", "entries")]
        assert counted == [4, 3, 2]
        assert gateway.metric("mirror_gateway_cache_bytes") == 2 * ENTRY
