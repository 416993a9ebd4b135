"""The second view of a text."""

import random
from functools import partial

import pytest

from training.augment import mask_span, mask_span_literally, repeat_tokens

TEXT = "abcdefghijklmnopqrstuvwxyz0123456789"


def views(length: int, count: int = 2000) -> list[str]:
    rng = random.Random(0)
    return [mask_span(TEXT, "<mask>", length, rng) for _ in range(count)]


def test_one_span_is_replaced_at_any_start_even_where_its_characters_occur_earlier() -> None:
    for view in views(5, 200):
        left, right = view.split(" <mask> ")
        assert len(left) + len(right) == len(TEXT) - 5
        assert TEXT.startswith(left)
        assert TEXT.endswith(right)
    assert {view.index(" <mask> ") for view in views(5)} == set(range(len(TEXT) - 5 + 1))
    rng = random.Random(0)
    starts = {mask_span("ab" * 20, "[MASK]", 4, rng).index(" [MASK]") for _ in range(500)}
    assert max(starts) == 36


@pytest.mark.parametrize("mask", [partial(mask_span, mask_token="[MASK]"), mask_span_literally])
def test_short_texts_and_length_zero_stay_whole(mask):
    rng = random.Random(0)
    assert mask(TEXT[:29], length=5, rng=rng) == TEXT[:29]
    assert "[MASK]" in mask(TEXT[:30], length=5, rng=rng)
    assert mask(TEXT, length=0, rng=rng) == mask(TEXT, length=len(TEXT), rng=rng) == TEXT


def published(text: str, length: int, start: int) -> str:
    """The rule of the published code, with a given draw."""
    left, right = text.split(text[start : start + length], 1)
    return left + " [MASK] " + right


def test_literal_masking_is_the_published_rule_and_never_draws_the_last_start() -> None:
    text = "abcab" * 8
    found = {mask_span_literally(text, 5, random.Random(seed)) for seed in range(300)}
    assert found == {published(text, 5, start) for start in range(len(text) - 5)}
    assert {view.index(" [MASK] ") for view in found} == set(range(5))  # the first occurrence, never a later one
    rng = random.Random(0)
    starts = {mask_span_literally(TEXT, 5, rng).index(" [MASK] ") for _ in range(2000)}
    assert starts == set(range(len(TEXT) - 5))


def test_repeating_keeps_order_and_special_tokens_and_varies_the_length() -> None:
    ids = [101, *range(1, 21), 102]
    views = [repeat_tokens(ids, 0.3, 50, random.Random(seed)) for seed in range(200)]
    assert {len(view) - len(ids) for view in views} == set(range(7))  # 0 to 0.3 * 20
    assert all(list(dict.fromkeys(view)) == ids for view in views)
    assert all(view.count(token) <= 2 for view in views for token in ids)
    assert all(view.count(101) == view.count(102) == 1 for view in views)
    assert {token for view in views for token in ids if view.count(token) == 2} == set(range(1, 21))


def test_texts_that_are_short_or_would_grow_too_long_are_not_repeated() -> None:
    short, full = [101, 7, 8, 9, 6, 102], [101, *range(1, 9), 102]
    for seed in range(50):
        assert repeat_tokens(short, 1.0, 50, random.Random(seed)) == short
        assert len(repeat_tokens(full, 1.0, 12, random.Random(seed))) <= 12
        assert repeat_tokens(full, 0.0, 50, random.Random(seed)) == full
