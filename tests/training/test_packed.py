"""Packed rows give each text the vector it has alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.reference import Reference
from mirror_runtime.bundle import Pooling
from tests.support.tuning import load
from training.packed import POOLINGS, encode_packed, hidden_states, pack, pool_packed, row_length

TEXTS = ["a", "the cat sat on the mat", "a man is playing a guitar by the river, is he?", "", "dogs", "zzz qqq"]
TEXTS += ["the dog sat on a man playing guitar", "a man, a dog, a cat, a mat, a river, a guitar"]


def tokens(reference: Reference) -> list[list[int]]:
    ids: list[list[int]] = reference.tokenizer(TEXTS, truncation=True, max_length=50)["input_ids"]
    return ids


def test_rows_are_filled_longest_first_and_keep_every_token() -> None:
    texts = [[7] * size for size in (3, 10, 6, 16, 4, 9)]
    packed = pack(texts, length=16, pad_id=0)
    assert packed.input_ids.shape == (3, 16)  # 16 | 10 + 6 | 9 + 4 + 3
    assert packed.tokens == 48
    assert bool((packed.text_ids > 0).all())
    for text, size in enumerate(len(ids) for ids in texts):
        inside = packed.text_ids == text + 1
        assert int(inside.sum()) == size
        assert packed.position_ids[inside].tolist() == list(range(size))


def test_attention_stays_within_a_text_and_no_query_is_left_without_a_key() -> None:
    packed = pack([[5, 6, 7], [8, 9]], length=16, pad_id=0)
    allowed = packed.attention_mask()[0, 0]
    assert allowed[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert allowed[4].nonzero().flatten().tolist() == [3, 4]
    assert bool(allowed.any(dim=1).all())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_vectors_equal_those_of_one_text_at_a_time(tiny_bert: Path, pooling: Pooling) -> None:
    reference = load(tiny_bert, pooling, max_tokens=50)
    options = {"pad_id": reference.tokenizer.pad_token_id, "pad_to": reference.spec.pad_to}
    packed = pack(tokens(reference), length=row_length(50), **options)
    with torch.inference_mode():
        vectors = encode_packed(reference.model, packed, pooling).numpy()
    alone = np.concatenate([reference.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    if pooling is not Pooling.MEAN_PADDED:
        assert packed.input_ids.shape[0] < len(TEXTS)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.05  # the texts do differ by far more than the tolerance


def test_row_lengths_are_multiples_of_sixteen_and_texts_that_do_not_fit_are_refused() -> None:
    assert [row_length(tokens) for tokens in (3, 16, 25, 50, 64, 65)] == [16, 16, 32, 64, 64, 80]
    for texts in ([[1] * 17], [[1], []]):
        with pytest.raises(ValueError, match="do not fit 16 slots"):
            pack(texts, length=16, pad_id=0)
    with pytest.raises(ValueError, match="do not fit"):
        pack([[1, 2, 3]], length=16, pad_id=0, pad_to=20)


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_pieces_give_the_vectors_of_the_whole(tiny_bert: Path, rows: int) -> None:
    reference = load(tiny_bert, max_tokens=50)
    packed = pack(tokens(reference), length=64, pad_id=0)
    with torch.inference_mode():
        whole = encode_packed(reference.model, packed, Pooling.MEAN)
        pieces = [(texts, encode_packed(reference.model, piece, Pooling.MEAN)) for texts, piece in packed.split(rows)]
    for texts, vectors in pieces:
        torch.testing.assert_close(vectors, whole[texts], atol=1e-6, rtol=0)
    assert sorted(torch.cat([texts for texts, _ in pieces]).tolist()) == list(range(len(TEXTS)))
    assert sum(piece.tokens for _, piece in packed.split(rows)) == packed.tokens


def test_layers_are_those_of_hugging_face_and_are_averaged(tiny_bert: Path) -> None:
    reference = load(tiny_bert, max_tokens=50)
    packed = pack(tokens(reference), length=64, pad_id=0)
    batch = reference.tokenizer(TEXTS, truncation=True, padding=True, max_length=50, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.inference_mode():
        states = reference.model(**batch, output_hidden_states=True).hidden_states
        expected = [(state * mask).sum(1) / mask.sum(1) for state in states]
        for state, vectors in zip(hidden_states(reference.model, packed), expected, strict=True):
            torch.testing.assert_close(pool_packed(state, packed, Pooling.MEAN), vectors, atol=1e-5, rtol=0)
        averaged = encode_packed(reference.model, packed, Pooling.MEAN, (0, -1))
    torch.testing.assert_close(averaged, (expected[0] + expected[-1]) / 2, atol=1e-5, rtol=0)


def test_the_largest_values_leave_padding_out(tiny_bert: Path) -> None:
    packed = pack([[5, 6], [7, 8, 9]], length=16, pad_id=0, pad_to=4)
    hidden = torch.arange(packed.input_ids.numel(), dtype=torch.float32).view(1, 16, 1).expand(1, 16, 2)
    assert pool_packed(hidden, packed, Pooling.MAX)[:, 0].tolist() == [1, 6]
    with pytest.raises(ValueError, match="do not support pooling ditto"):
        pool_packed(hidden, packed, Pooling.DITTO)
