"""The gate itself: what it must refuse, and what it must not see as a fault."""

import numpy as np
import pytest

from export.parity import Expected, prove
from export.texts import NASTY, parity_texts, read_texts
from mirror_runtime.bundle import EncoderSpec, Pooling
from mirror_runtime.errors import InputError, ParityError

SPEC = EncoderSpec(
    base_model="x",
    revision=None,
    family="bert",
    pooling=Pooling.MEAN,
    normalize=True,
    max_tokens=64,
    dim=8,
    pad_to=None,
)
TEXTS = tuple(f"text {i}" for i in range(40))


def vectors() -> np.ndarray:
    raw = np.random.default_rng(0).normal(size=(len(TEXTS), 8)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@pytest.fixture
def expected() -> Expected:
    return Expected(texts=TEXTS, vectors=vectors(), reference="PyTorch", spec=SPEC)


def lookup(table: np.ndarray):
    return lambda texts: table[[TEXTS.index(text) for text in texts]]


def test_equal_vectors_pass_and_what_was_achieved_is_kept(expected):
    parity = prove(lookup(vectors()), expected, floor=0.99999, what="x")
    assert parity.texts == 40
    assert parity.min_cosine == pytest.approx(1.0)
    assert parity.max_abs_diff == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_refused_by_name(expected, bad):
    table = vectors()
    table[7, 3] = bad
    with pytest.raises(ParityError, match="NaN or infinity for 1 of 40 texts, such as 'text 7'"):
        prove(lookup(table), expected, floor=0.99999, what="x")


def test_a_reference_that_is_not_finite_is_refused():
    with pytest.raises(ParityError, match="the reference"):
        Expected(texts=TEXTS, vectors=vectors() * np.float32("nan"), reference="PyTorch", spec=SPEC)


def test_the_worst_text_is_named(expected):
    table = vectors()
    table[11] = -table[11]
    with pytest.raises(ParityError, match="Worst: 'text 11' cosine -1"):
        prove(lookup(table), expected, floor=0.99999, what="x")


def test_a_missing_normalisation_is_seen_although_every_cosine_is_one(expected):
    with pytest.raises(ParityError, match="of its length"):
        prove(lookup(vectors() * np.float32(3)), expected, floor=0.99999, what="x")


def test_vectors_that_depend_on_neighbours_are_refused(expected):
    table = vectors()

    def leaky(texts):
        found = lookup(table)(texts)
        return found if len(texts) in (1, len(TEXTS)) else found + np.float32(0.1) * found.mean(0)

    with pytest.raises(ParityError, match="depend on the other texts"):
        prove(leaky, expected, floor=0.99999, what="x")


def test_built_in_texts_are_many_ragged_and_the_same_each_time():
    texts = parity_texts()
    assert len(texts) >= 1000
    assert texts == parity_texts()
    assert set(NASTY) <= set(texts)
    assert max(map(len, texts)) == 100_000
    assert len({len(text) for text in texts}) > 100


def test_texts_are_read_one_a_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n two\u2028still two\n", encoding="utf-8")
    assert read_texts(path) == ("one", " two\u2028still two")


@pytest.mark.parametrize(("content", "problem"), [(b"\n \n", "holds no text"), (b"\xff\xfe", "no UTF-8")])
def test_a_file_without_usable_texts_is_refused(tmp_path, content, problem):
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read_texts(path)
