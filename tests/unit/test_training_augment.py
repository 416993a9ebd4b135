"""The second view of a text."""

import random

from training.augment import mask_span

TEXT = "abcdefghijklmnopqrstuvwxyz0123456789"


def views(length: int, count: int = 2000) -> list[str]:
    rng = random.Random(0)
    return [mask_span(TEXT, "<mask>", length, rng) for _ in range(count)]


def test_one_span_of_the_length_asked_for_gives_way_to_the_mask_token() -> None:
    for view in views(5, 200):
        left, right = view.split(" <mask> ")
        assert len(left) + len(right) == len(TEXT) - 5
        assert TEXT.startswith(left)
        assert TEXT.endswith(right)


def test_every_start_is_drawn_the_last_included() -> None:
    assert {view.index(" <mask> ") for view in views(5)} == set(range(len(TEXT) - 5 + 1))


def test_the_drawn_span_is_masked_even_where_its_characters_occur_earlier() -> None:
    rng = random.Random(0)
    starts = {mask_span("ab" * 20, "[MASK]", 4, rng).index(" [MASK]") for _ in range(500)}
    assert max(starts) == 36


def test_short_texts_and_length_zero_stay_whole() -> None:
    rng = random.Random(0)
    assert mask_span(TEXT[:29], "[MASK]", 5, rng) == TEXT[:29]
    assert "[MASK]" in mask_span(TEXT[:30], "[MASK]", 5, rng)
    assert mask_span(TEXT, "[MASK]", 0, rng) == TEXT
    assert mask_span(TEXT, "[MASK]", len(TEXT), rng) == TEXT


def test_one_seed_gives_the_same_views_again() -> None:
    assert views(5, 50) == views(5, 50)
