"""Packed rows hold every token once, and are full."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mirror_runtime.packing import BLOCK, PackedBatch, ShapeSet, _assign, pack, pack_shape

SHAPES = ShapeSet.up_to(256)
BULK = SHAPES.with_intermediate()


def test_lengths_double_and_end_at_the_limit():
    found = [ShapeSet.up_to(limit).lengths for limit in (50, 256, 384, 500)]
    assert found == [(64,), (64, 128, 256), (64, 128, 256, 384), (64, 128, 256, 512)]
    assert SHAPES.row_counts(64) == (16, 4, 1)


def test_intermediate_lengths_are_three_quarters_and_seven_eighths():
    assert BULK.lengths == SHAPES.lengths
    assert BULK.intermediate_lengths == (48, 96, 112, 192, 224)
    assert BULK.row_counts(192) == (5,)
    assert set(BULK.shapes()) - set(SHAPES.shapes()) == {(21, 48), (10, 96), (9, 112), (5, 192), (4, 224)}
    assert ShapeSet.up_to(384).with_intermediate().intermediate_lengths == (48, 96, 112, 192, 224, 320, 352)
    assert ShapeSet.up_to(64, base=32).with_intermediate().intermediate_lengths == (48,)  # 24, 28, 56 are not blocks


def test_lengths_of_more_than_two_blocks_are_multiples():
    shape_set = ShapeSet.up_to(300, length_multiple=64)
    assert shape_set.lengths == (64, 128, 256, 320)
    assert ShapeSet.up_to(100, base=48, length_multiple=64).lengths == (64, 128)
    assert ShapeSet.up_to(100, base=32, length_multiple=64).lengths == (32, 64, 128)
    assert shape_set.with_intermediate().intermediate_lengths == (192,)
    assert [shape for shape in shape_set.shapes() if shape[1] < 64] == [(1, 16), (1, 32)]
    for tokens, length in ((9, 16), (30, 32), (33, 64), (50, 64)):
        (batch,) = packed([tokens], shape_set)
        assert batch.rows.shape == (1, length)


def packed(lengths: Any, shape_set: ShapeSet = SHAPES, streams: int = 1) -> list[PackedBatch]:
    """Pack pieces of these lengths; all their tokens are 1."""
    sizes = np.asarray(lengths, np.int64)
    return pack(np.ones(sizes.sum(), np.int64), sizes, shape_set, streams=streams)


def shapes(lengths: Any, shape_set: ShapeSet = SHAPES, streams: int = 1) -> list[tuple[int, int]]:
    return [batch.rows.shape for batch in packed(lengths, shape_set, streams)]


def slots(lengths: Any, shape_set: ShapeSet = SHAPES) -> int:
    return sum(rows * length for rows, length in shapes(lengths, shape_set, streams=2))


def check_piece(batch: PackedBatch, piece: int, slot: int, ids: Any) -> None:
    """Check that a slot's segment holds these ids, at positions from 0."""
    row, segment = divmod(int(slot), batch.rows.shape[1] // 4)
    mine = batch.rows.segment_ids[row] == segment + 1
    assert (batch.rows.input_ids[row][mine] == ids).all()
    assert (batch.rows.position_ids[row][mine] == np.arange(len(ids))).all()


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 256), st.integers(1, 5), st.integers(129, 192)), max_size=300),
    streams=st.integers(1, 4),
    shape_set=st.sampled_from([SHAPES, BULK]),
)
@example(lengths=[4] * 10 + [1] * 60, streams=1, shape_set=SHAPES)  # rows run out of slots before tokens
@example(lengths=[33] * 21 + [1] * 294, streams=1, shape_set=BULK)  # 48 tokens would suffice, but not their slots
@example(lengths=[2] * 100, streams=1, shape_set=SHAPES)  # tiny pieces
def test_every_token_lands_once_in_its_own_segment(lengths, streams, shape_set):
    sizes = np.array(lengths, np.int64)
    ids = np.arange(1, sizes.sum() + 1)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    batches = pack(ids, sizes, shape_set, streams=streams)
    seen: list[int] = []
    for batch in batches:
        rows, length = batch.rows.shape
        assert (rows, length) in shape_set.shapes()
        assert length % BLOCK == 0
        assert batch.tokens == np.count_nonzero(batch.rows.input_ids)
        assert ((batch.rows.input_ids > 0) == (batch.rows.segment_ids > 0)).all()
        for piece, slot in zip(batch.pieces, batch.slots, strict=True):
            check_piece(batch, piece, slot, ids[starts[piece] : starts[piece + 1]])
            seen.append(int(piece))
    assert sorted(seen) == list(range(len(lengths)))


def test_ragged_short_texts_fill_the_rows():
    sizes = np.random.default_rng(1).integers(5, 40, 4000)
    assert sizes.sum() / slots(sizes) > 0.97


@pytest.mark.parametrize("size", [40, 90, 150])
def test_texts_of_one_length_get_rows_of_three_quarters(size):
    assert slots([size] * 1000, BULK) < 0.8 * slots([size] * 1000)


@pytest.mark.parametrize(("longest", "share"), [(40, 0), (256, 0.05)])
def test_ragged_texts_leave_little_to_shorten(longest, share):
    found = shapes(np.random.default_rng(1).integers(5, longest + 1, 4000), BULK, streams=2)
    assert sum(length in BULK.intermediate_lengths for _, length in found) <= share * len(found)


@pytest.mark.parametrize(
    ("rows", "three_quarters", "seven_eighths"),
    [(7, 0, 0), (9, 0, 8), (10, 10, 0), (19, 10, 8), (20, 20, 0), (23, 20, 0)],
)
def test_rows_are_shortened_in_full_batches_for_every_stream(rows, three_quarters, seven_eighths):
    batches = packed([150] * rows, BULK, streams=2)
    found = [batch.rows.shape for batch in batches]
    assert found.count((5, 192)) == three_quarters / 5
    assert found.count((4, 224)) == seven_eighths / 4
    left = rows - three_quarters - seven_eighths
    assert sum(batch.pieces.size for batch in batches if batch.rows.shape[1] == 256) == left


def test_single_rows_come_last_and_one_short_text_gets_the_shortest_row():
    assert shapes([9]) == [(1, 16)]
    assert shapes([20, 20]) == [(1, 48)]
    found = shapes([256] * 17 + [128] * 18, streams=2)
    assert found == [(4, 256)] * 4 + [(8, 128)] * 2 + [(1, 256)] + [(1, 128)] * 2


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 256), max_size=200))
def test_one_piece_a_row_in_a_shape_that_its_own_length_decides(lengths):
    alone = SHAPES.one_a_row()
    seen = []
    for batch in packed(lengths, alone):
        assert batch.rows.shape in alone.shapes()
        assert batch.rows.segment_ids.max() == 1
        for piece, slot in zip(batch.pieces, batch.slots, strict=True):
            assert batch.rows.shape == shapes([lengths[piece]], alone)[0]
            assert slot % (batch.rows.shape[1] // 4) == 0
            check_piece(batch, piece, slot, np.ones(lengths[piece]))
        seen += batch.pieces.tolist()
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 256), max_size=200), shape=st.sampled_from(BULK.shapes()))
def test_a_shape_is_filled_with_the_longest_pieces_that_fit(lengths, shape):
    sizes = np.array(lengths, np.int64)
    ids = np.arange(1, sizes.sum() + 1)
    starts = np.cumsum(sizes) - sizes
    batch = pack_shape(ids, sizes, shape)
    assert batch.rows.shape == shape
    assert len(set(batch.pieces.tolist())) == batch.pieces.size
    fitting = sorted(sizes[sizes <= shape[1]].tolist(), reverse=True)
    assert sorted(sizes[batch.pieces].tolist(), reverse=True)[: shape[0]] == fitting[: shape[0]]
    for piece, slot in zip(batch.pieces, batch.slots, strict=True):
        check_piece(batch, piece, slot, ids[starts[piece] :][: sizes[piece]])


def test_pieces_of_one_size_are_placed_as_one_by_one():
    """Equal pieces are placed together. Placing one at a time into the tightest row must not need fewer rows."""
    sizes = np.sort(np.random.default_rng(2).integers(2, 257, 700))[::-1]
    space: list[list[int]] = []  # free tokens and slots of each row
    for size in sizes.tolist():
        fitting = [row for row in space if row[0] >= size and row[1] > 0]
        if not fitting:
            length = next(length for length in SHAPES.lengths if length >= size)
            space.append([length, length // 4])
            fitting = space[-1:]
        tightest = min(fitting, key=lambda row: row[0])
        tightest[0] -= size
        tightest[1] -= 1
    _, row_lengths = _assign(sizes, SHAPES)
    assert len(row_lengths) == len(space)


def test_padding_of_a_piece_has_its_negated_number():
    ids, sizes, own = np.arange(1, 25), np.array([8, 8, 8]), np.array([3, 8, 5])
    (batch,) = pack(ids, sizes, SHAPES, unpadded_lengths=own)
    same = pack_shape(ids, sizes, (1, 32), unpadded_lengths=own)
    for array in ("input_ids", "position_ids", "segment_ids"):
        assert (getattr(batch.rows, array) == getattr(same.rows, array)).all()
    assert batch.tokens == same.tokens == 16
    (row,) = batch.rows.segment_ids
    assert row.tolist() == [1] * 3 + [-1] * 5 + [2] * 8 + [3] * 5 + [-3] * 3 + [0] * 8
    assert batch.rows.position_ids[0].tolist() == [*range(8)] * 3 + [0] * 8
    assert batch.rows.input_ids[0].tolist() == [*range(1, 25)] + [0] * 8


@pytest.mark.parametrize(
    ("rows", "streams", "counts"),
    [
        (3, 1, [1, 1, 1]),
        (4, 1, [4]),
        (16, 1, [16]),
        (16, 2, [4] * 4),
        (16, 3, [4] * 3 + [1] * 4),
        (2, 2, [1, 1]),
        (5, 2, [1] * 5),  # four in one batch would leave a stream idle
        (6, 2, [4, 4]),  # two rows stay empty, but no stream
        (9, 2, [4, 4, 1]),
        (31, 2, [4] * 8),  # large batches come in pairs
        (32, 2, [16, 16]),
        (34, 16, [4] * 9),
    ],
)
def test_few_rows_are_split_so_that_no_stream_waits_for_another(rows, streams, counts):
    assert [count for count, _ in shapes([SHAPES.lengths[0]] * rows, streams=streams)] == counts
