import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ceilings import EncoderShape, measure_ceiling, read_shape
from benchmarks.workload import QUICK_TEXTS, Shape, bundle_tokenizer, load_workload, texts_of_length
from mirror_runtime.bundle import TOKENIZER_FILE, EngineName, Precision
from mirror_runtime.errors import BundleError, EngineError, InputError


@pytest.fixture
def tokenizer(minilm):
    return bundle_tokenizer(minilm / TOKENIZER_FILE, 32)


def test_a_file_keeps_its_order_and_loses_blank_lines(tokenizer, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("second word\r\n\n  \nfirst " + "word " * 50 + "\n", encoding="utf-8")
    workload = load_workload(file, tokenizer, quick=False, seed=0)
    assert [text.split()[0] for text in workload.texts] == ["second", "first"]
    info = workload.info
    assert (info.texts, info.distinct, info.tokens_max, info.truncated) == (2, 2, 32, 1)  # the limit cuts the second
    assert info.tokens_mean == (4 + 32) / 2


def test_quick_takes_a_seeded_sample(tokenizer, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"text {i}" for i in range(3 * QUICK_TEXTS)), encoding="utf-8")
    one, same, other = (load_workload(file, tokenizer, quick=True, seed=seed) for seed in (1, 1, 2))
    assert len(one.texts) == QUICK_TEXTS
    assert one == same
    assert one.texts != other.texts


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_texts_is_refused(tokenizer, tmp_path, content):
    file = tmp_path / "texts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"texts\.txt"):
        load_workload(file, tokenizer, quick=False, seed=0)


def test_docstrings_make_a_real_workload(tokenizer):
    workload = load_workload(None, tokenizer, quick=True, seed=0)
    assert len(set(workload.texts)) == QUICK_TEXTS
    assert workload.info.tokens_p50 < workload.info.tokens_p90 < workload.info.tokens_max


def test_words_are_cut_into_texts_of_drawn_lengths(minilm):
    whole = bundle_tokenizer(minilm / TOKENIZER_FILE, 512)
    lines = load_workload(None, whole, quick=False, seed=0)
    passages, mixed = (load_workload(None, whole, quick=False, seed=0, shape=shape) for shape in list(Shape)[1:])
    lengths = whole(passages.texts).tokens
    assert (lengths.min(), 200 < lengths.max() <= 256 + 20) >= (96, True)
    assert 150 < lengths.mean() < 200
    short_and_long = whole(mixed.texts).tokens
    assert 5 <= short_and_long.min() < 10
    assert 400 < short_and_long.max() <= 512
    assert np.median(short_and_long) < 100  # most are short
    words = " ".join(lines.texts).split()
    for workload in (passages, mixed):
        assert words[: len(" ".join(workload.texts).split())] == " ".join(workload.texts).split()
    assert "96 to 256 tokens" in passages.info.source


@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_texts_have_exactly_the_length(tokenizer, tokens):
    words = [f"{word} naïve tokenisation," for word in ("bread", "unquestionably", "rain", "of", "light", "hydrology")]
    texts = texts_of_length(words, tokenizer, tokens, count=4, seed=0)
    assert len(texts) == 4
    assert tokenizer(texts).tokens.tolist() == [tokens] * 4


def test_too_few_words_are_said(tokenizer):
    with pytest.raises(InputError, match="use a --texts file with more words"):
        texts_of_length(["one"], tokenizer, 32, count=4, seed=0)


def test_texts_that_miss_the_length_are_not_used(tokenizer):
    def merging(texts):  # as a byte-level tokenizer may: words together are not the sum of the words
        tokenized = tokenizer(texts)
        longer = np.array([" " in text for text in texts], np.int64)
        return dataclasses.replace(tokenized, tokens=tokenized.tokens + longer)

    with pytest.raises(InputError, match="give 0 texts of exactly 8 tokens"):
        texts_of_length(["rain of light"], merging, 8, count=1, seed=0)


def test_a_token_costs_two_operations_a_weight(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}', encoding="utf-8"
    )
    # 6 layers of 4 * 384^2 + 2 * 384 * 1536 = 1,769,472 weights
    assert read_shape(tmp_path).flop_per_token == 2 * 6 * 1_769_472


@pytest.mark.parametrize("content", [None, "{}", "[]", "{"])
def test_an_unknown_shape_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=r"config\.json"):
        read_shape(tmp_path)


@pytest.mark.parametrize("engine", [EngineName.ONNXRUNTIME, EngineName.OPENVINO])
def test_ceilings_are_measured_in_the_engines_library(engine):
    ceiling = measure_ceiling(engine, Precision.FP32, EncoderShape(layers=1, hidden=16, intermediate=32))
    assert ceiling.gflop_per_s == ceiling.flop_per_sample / min(ceiling.samples_s) / 1e9
    assert ceiling.flop_per_sample % (2 * ceiling.rows * ceiling.inner * ceiling.outer) == 0


def test_no_ceiling_is_made_up():
    with pytest.raises(EngineError, match="onnxruntime bf16"):
        measure_ceiling(EngineName.ONNXRUNTIME, Precision.BF16, EncoderShape(layers=1, hidden=16, intermediate=32))
