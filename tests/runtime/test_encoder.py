import logging
import multiprocessing
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from mirror_runtime import Encoder, EngineError, InputError, TextError
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.encoder import Encoded, PendingWindow
from mirror_runtime.engines.fake import FakeEngine


@pytest.fixture
def encoder(make_bundle):
    with Encoder.load(make_bundle(), engine="fake", streams=2) as encoder:
        yield encoder


def ragged(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randrange(0, 30))) for i in range(n)]


def test_order_is_kept_and_neighbours_windows_and_threads_do_not_matter(encoder):
    texts = ragged(700)
    together = encoder.encode(texts)
    stats = encoder.stats
    assert stats.texts == 700
    assert stats.executions > 1
    assert 0.8 < stats.tokens / stats.slots <= 1.0
    assert together.shape == (700, 8)
    assert together.dtype == np.float32
    for i in range(0, 700, 37):
        np.testing.assert_array_equal(encoder.encode([texts[i]])[0], together[i])
    parts = list(encoder.encode_stream((t for t in texts), window=33))
    assert [len(p.vectors) for p in parts] == [33] * 21 + [7]
    np.testing.assert_array_equal(np.concatenate([p.vectors for p in parts]), together)
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(encoder.encode, [texts[i::4] for i in range(4)])):
            np.testing.assert_array_equal(found, together[i::4])


def test_nothing_gives_an_empty_array_and_what_is_not_a_list_of_texts_is_named(encoder):
    assert encoder.encode([]).shape == (0, 8)
    assert encoder.encode_detailed(iter(())).errors == {}
    for texts in ("one string", b"bytes", None, 5, np.array("abc")):
        with pytest.raises(InputError, match="pass a list"):
            encoder.encode(texts)


def test_a_frame_is_refused_where_iterating_would_encode_its_column_names(encoder, monkeypatch):
    import pandas
    import pyarrow

    monkeypatch.setattr(encoder, "prompts", {"query": "find: "})
    columns = {"text": ["a", "b"]}
    for texts in (columns, pyarrow.table(columns), pandas.DataFrame(columns)):
        for name in (None, "query"):
            with pytest.raises(InputError, match=r"pass one column, such as list\(texts\['text'\]\)"):
                encoder.encode(texts, prompt_name=name)


def test_a_vector_that_is_not_finite_is_an_error_of_its_text_alone(encoder, monkeypatch):
    texts = ragged(300)
    expected, run = encoder.encode(texts), encoder.engine.run
    spoilt = expected[137]

    def broken(rows):
        vectors = run(rows)
        vectors[(vectors == spoilt).all(axis=-1)] = [np.nan, np.inf, 0, 0, 0, 0, 0, 0]
        return vectors

    monkeypatch.setattr(encoder.engine, "run", broken)
    encoded = encoder.encode_detailed(texts)
    assert list(encoded.errors) == [137]
    assert not encoded.vectors[137].any()
    np.testing.assert_array_equal(np.delete(encoded.vectors, 137, 0), np.delete(expected, 137, 0))
    assert encoder.stats.failed == 1
    with pytest.raises(TextError, match="text 137: has a vector with NaN or infinity"):
        encoder.encode(texts)


def use_in_child(encoder: Encoder, begun: PendingWindow, stream: Iterator[Encoded], answers: Any) -> None:
    uses = (
        lambda: encoder.encode(["the cat sat on the mat."]),
        lambda: encoder.finish(begun),
        lambda: list(stream),
        lambda: list(encoder.encode_shapes(["the cat"])),
        encoder.warm_up,
    )
    for use in uses:
        try:
            use()
        except EngineError as error:
            answers.put(str(error))
    encoder.close()


@pytest.mark.process
@pytest.mark.parametrize("engine", ["fake", "onnxruntime", "openvino"])
def test_an_encoder_in_a_forked_child_raises_and_never_hangs(tiny_bundle, make_bundle, engine):
    context = multiprocessing.get_context("fork")
    bundle = make_bundle() if engine == "fake" else tiny_bundle
    with Encoder.load(bundle, engine=engine, precision="fp32") as encoder:
        expected = encoder.encode(["the cat sat on the mat."])
        answers = context.SimpleQueue()
        stream = encoder.encode_stream(["the cat sat on the mat."] * 5000, 500)
        next(stream)
        begun = encoder.begin(["a dog"])
        child = context.Process(target=use_in_child, args=(encoder, begun, stream, answers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
            child.start()
        child.join(30)
        assert child.exitcode == 0
        for _ in range(5):
            assert "before the process forked" in answers.get()
        assert sum(len(part.vectors) for part in stream) == 4500
        np.testing.assert_array_equal(encoder.encode(["the cat sat on the mat."]), expected)


FORK = """
import os, signal, sys
from mirror_runtime import Encoder
encoder = Encoder.load(sys.argv[1], engine=sys.argv[2], precision="fp32", plan=None)
encoder.encode(["a"])
child = os.fork()
if not child:
    signal.alarm(10)
    sys.exit()  # destroys what it has, as a worker of gunicorn does
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.process
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_forked_child_ends_though_it_inherits_an_encoder(tiny_bundle, engine):
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_bundle), engine]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


def test_a_bad_text_is_named_by_position_across_windows(encoder, monkeypatch):
    monkeypatch.setattr("mirror_runtime.encoder.Encoder.encode_stream.__defaults__", (10,))
    texts: list[object] = list(ragged(40))
    texts[23] = None
    with pytest.raises(TextError, match="text 23: is NoneType"):
        encoder.encode(texts)
    detailed = encoder.encode_detailed(texts)
    assert list(detailed.errors) == [23]
    assert not detailed.vectors[23].any()
    good = [t for t in texts if t is not None]
    np.testing.assert_array_equal(np.delete(detailed.vectors, 23, 0), encoder.encode(good))


def test_truncation_is_counted_marked_and_logged(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        detailed = encoder.encode_detailed(["short", "word " * 500])
    assert detailed.truncated.tolist() == [False, True]
    assert detailed.tokens.tolist() == [3, 502]
    assert encoder.stats.truncated == 1
    assert "1 of 2 texts are longer than 64 tokens" in caplog.text


@pytest.mark.parametrize("policy", ["chunk", "chunk-weighted", "chunk-max"])
def test_the_vectors_of_chunks_are_joined_and_normalised(make_bundle, policy):
    long = " ".join(f"word{i}" for i in range(60))
    with Encoder.load(make_bundle(), engine="fake", long_texts=policy) as encoder:
        whole = encoder.encode(["a", long, "b"])
        alone = encoder.encode(["a", "b"])
        tokenized = encoder._tokenizer([long])
        shapes = [held.tolist() for _, held, _ in encoder.encode_shapes(["short", long])]
    assert all(held in ([0], []) for held in shapes), "a text in several pieces proves no shape"
    pieces = np.split(tokenized.ids, np.cumsum(tokenized.lengths)[:-1])
    assert len(pieces) > 1
    keys = np.array([((piece + 1) * (np.arange(len(piece)) + 1)).sum() % 9973 for piece in pieces])
    vectors = np.sin(np.arange(1, 9) * (1.0 + keys[:, None]))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    joined = units.max(axis=0)
    if policy != "chunk-max":
        assert tokenized.lengths[-1] < tokenized.lengths[0]
        joined = np.average(units, axis=0, weights=tokenized.lengths if policy == "chunk-weighted" else None)
    np.testing.assert_allclose(whole[1], joined / np.linalg.norm(joined), atol=1e-6)
    np.testing.assert_array_equal(whole[[0, 2]], alone)


def test_a_caller_that_stops_early_leaves_nothing_running_and_an_engine_failure_reaches_it(encoder, monkeypatch):
    stream = encoder.encode_stream(ragged(5000), window=50)
    next(stream)
    stream.close()
    assert encoder.encode(["still works"]).shape == (1, 8)
    monkeypatch.setattr(encoder.engine, "run", Mock(side_effect=EngineError("out of cheese")))
    with pytest.raises(EngineError, match="out of cheese"):
        encoder.encode(ragged(100))


@pytest.fixture
def seen(encoder, monkeypatch):
    """Record the rows that the engine runs."""
    batches = []
    run = encoder.engine.run
    monkeypatch.setattr(encoder.engine, "run", lambda rows: (batches.append(rows), run(rows))[1])
    return batches


def test_warm_up_runs_every_shape_that_calls_outside_bulk_need_and_refuses_what_is_not_finite(
    encoder, seen, monkeypatch
):
    encoder.warm_up()
    assert sorted(rows.shape for rows in seen) == sorted(encoder._shapes.shapes())
    monkeypatch.setattr(encoder.engine, "run", lambda rows: np.full((*rows.shape, 8), np.nan, np.float32))
    with pytest.raises(EngineError, match="hold NaN or infinity"):
        encoder.warm_up()


ALIKE = [f"{i} " + "word " * 36 for i in range(100)]
"""Texts of 39 tokens, all different."""


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_invariant_vector_is_equal_to_the_bit_whatever_its_neighbours(tiny_bundle, engine):
    texts = [*ragged(150), "word " * 60, "", "a"]
    with Encoder.load(tiny_bundle, engine=engine, precision="fp32", plan=None, invariant=True) as encoder:
        encoder.warm_up()
        many = encoder.encode(texts)
        backwards = encoder.encode(texts[::-1])[::-1]
        alone = np.concatenate([encoder.encode([text]) for text in texts[::5]])
        assert "one text" in encoder.rows
    assert many.tobytes() == backwards.tobytes()
    assert many[::5].tobytes() == alone.tobytes()
    with Encoder.load(tiny_bundle, engine=engine, precision="fp32", plan=None) as encoder:
        np.testing.assert_allclose(many, encoder.encode(texts), atol=1e-5)


def test_an_engine_of_fixed_shapes_cannot_be_invariant(make_bundle, monkeypatch):
    fixed = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(FakeEngine, "dynamic_shapes", fixed, raising=False)
    with pytest.raises(EngineError, match="fake cannot be invariant: choose onnxruntime or openvino"):
        Encoder.load(make_bundle(), engine="fake", invariant=True)


def test_many_texts_of_one_length_run_in_shorter_rows_with_the_same_vectors(encoder, seen):
    vectors = encoder.encode(ALIKE)
    assert [rows.shape for rows in seen].count((21, 48)) == 4
    seen.clear()
    everyday = encoder.finish(encoder.begin(ALIKE)).vectors
    assert {rows.shape[1] for rows in seen} == {64}
    np.testing.assert_array_equal(vectors, everyday)


def test_an_engine_of_fixed_shapes_is_asked_for_no_others(make_bundle, monkeypatch):
    monkeypatch.setattr(
        FakeEngine, "dynamic_shapes", property(lambda self: False, lambda self, value: None), raising=False
    )
    with Encoder.load(make_bundle(), engine="fake", streams=2) as encoder:
        encoder.encode(ALIKE)
        assert encoder._bulk_shapes.shapes() == encoder._shapes.shapes()
        assert "many of a kind" not in encoder.rows


def test_every_shape_that_texts_leave_out_is_run_for_a_proof_and_gives_their_vectors(encoder, seen):
    texts = [*ragged(300), *ALIKE, "too long " * 80, *ragged(2)]
    expected = encoder.encode(texts)
    filled = {rows.shape for rows in seen if rows.segment_ids.any(axis=1).all()}
    assert filled
    seen.clear()
    for shape, held, vectors in encoder.encode_shapes(texts):
        assert held.size >= shape[0], "each row holds a text"
        np.testing.assert_array_equal(vectors, expected[held])
    assert sorted(rows.shape for rows in seen) == sorted(set(encoder._bulk_shapes.shapes()) - filled)


def test_a_short_call_runs_in_its_callers_thread_and_never_more_than_the_streams_run(encoder, monkeypatch):
    threads, running, counts = [], [], []
    run = encoder.engine.run

    def counted(rows):
        threads.append(threading.current_thread())
        running.append(rows)
        counts.append(len(running))
        time.sleep(0.002)
        running.pop()
        return run(rows)

    monkeypatch.setattr(encoder.engine, "run", counted)
    encoder.encode(["one short text"])
    encoder.encode(ragged(300))
    assert threads[0] is threading.main_thread()
    assert threading.main_thread() not in threads[1:], "many batches run in the pool"
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(encoder.encode, [*([f"text {i}"] * 3 for i in range(8)), ragged(200)]))
    assert max(counts) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "onnx"}, EngineError, "engine 'onnx' is unknown: it must be one of auto, onnxruntime"),
        ({"precision": "half"}, EngineError, "precision 'half' is unknown"),
        ({"engine": "openvino"}, EngineError, "it has onnxruntime fp32"),
        ({"long_texts": "cut"}, InputError, "must be one of truncate, error, chunk"),
        ({"engine": "fake", "streams": 0}, EngineError, "streams is 0"),
    ],
)
def test_unknown_choices_are_refused_with_the_known_ones(make_bundle, make_artifact, options, error, message):
    folder = make_bundle(artifacts=(make_artifact(EngineName.ONNXRUNTIME, Precision.FP32),))
    with pytest.raises(error, match=message):
        Encoder.load(folder, **options)


@pytest.mark.parametrize("engine", ["fake", "onnxruntime", "openvino"])
def test_closing_while_others_encode_ends_each_call_in_vectors_or_one_clear_error(tiny_bundle, make_bundle, engine):
    encoder = Encoder.load(make_bundle() if engine == "fake" else tiny_bundle, engine=engine, precision="fp32")
    texts = ["the cat sat on the mat."] * 3 + [f"{'a' * (i % 9)} {'river ' * (i % 30)}" for i in range(300)]
    encoder.encode(texts)
    ends: list[str] = []

    def call() -> None:
        try:
            while True:
                encoder.encode(texts)
                encoder.encode(texts[:1])
        except EngineError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    encoder.close()
    encoder.close()
    for thread in threads:
        thread.join(30)
    assert ends == ["this encoder is closed: load it again"] * 4
    for use in (lambda: encoder.encode([]), lambda: next(encoder.encode_shapes(["a"])), encoder.warm_up):
        with pytest.raises(EngineError, match="closed: load it again"):
            use()
