"""The reference's batches: texts of like length together, so that padding costs little."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encoders.reference import PADDED_FILL, PADDED_TEXTS, PADDED_TOKENS, padded_batches
from mirror_runtime.bundle import Pooling
from tests.support.tuning import load


@given(lengths=st.lists(st.one_of(st.integers(0, 30), st.integers(1, 6000)), max_size=200))
def test_padded_batches_hold_every_text_once_within_their_limits(lengths):
    tokens = np.array(lengths, np.int64)
    batches = list(padded_batches(tokens))
    assert sorted(text for batch in batches for text in batch.tolist()) == list(range(tokens.size))
    for batch in batches:
        padded = batch.size * tokens[batch].max()
        assert batch.size == 1 or (batch.size <= PADDED_TEXTS and padded <= PADDED_TOKENS)
        assert tokens[batch].sum() >= PADDED_FILL * padded


def test_equal_texts_fill_a_batch():
    assert [batch.size for batch in padded_batches(np.full(70, 20))] == [PADDED_TEXTS, PADDED_TEXTS, 6]
    assert [batch.size for batch in padded_batches(np.full(9, 512))] == [8, 1]


@pytest.mark.parametrize("family", ["albert", "electra"])
def test_vectors_are_fp32_also_where_the_last_layer_computes_in_bf16(tiny_encoder, family):
    reference = load(tiny_encoder(family), Pooling.CLS)
    expected = reference.encode_unnormalized(["the cat"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reference.encode_unnormalized(["the cat"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.1)
