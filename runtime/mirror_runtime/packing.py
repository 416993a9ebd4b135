"""Token ids to packed rows, and slots back to pieces: the idea that runs through the house.

A batch is R rows of L tokens, each row holding several pieces one after another, told apart by segment ids. The row
lengths and row counts come from a short `Ladder`, so that an engine compiles few static shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import TOKENS_PER_SLOT

BLOCK = 16
"""Row lengths are multiples of this: engines' attention kernels are slow for others."""

TOKEN_BUDGET = 1024
"""Tokens of a full batch: enough to keep matrix products at their rate, small enough to stay in cache."""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The three inputs of a packed graph, each int64 [R, L].

    Attributes:
        input_ids: token ids; 0 where empty.
        position_ids: 0, 1, … within each piece; 0 where empty.
        segment_ids: 1, 2, … for the pieces of a row; 0 where empty.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and row length."""
        rows, length = self.input_ids.shape
        return rows, length


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows and where each piece's vector will be found.

    Attributes:
        rows: the engine's input.
        pieces: int64 [m], the pieces in this batch.
        slots: int64 [m], the flat index of each piece's vector in the engine's output [R * (L // 4)].
        tokens: useful tokens in the rows.
    """

    rows: PackedRows
    pieces: NDArray[np.int64]
    slots: NDArray[np.int64]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The static shapes an encoder runs in.

    Attributes:
        lengths: row lengths, ascending; each is double the one before, the first is the everyday one.
        budget: tokens of a full batch.
    """

    lengths: tuple[int, ...]
    budget: int = TOKEN_BUDGET

    @staticmethod
    def up_to(max_tokens: int, *, base: int = 64, budget: int = TOKEN_BUDGET) -> Ladder:
        """Build the ladder for pieces of up to `max_tokens`: base, 2 base, … and the first that holds them all.

        The last length is cut to the next multiple of 16, so that 384 does not cost 512.
        """
        lengths = [base]
        while lengths[-1] < max_tokens:
            lengths.append(min(2 * lengths[-1], _blocks(max_tokens)))
        return Ladder(lengths=tuple(lengths), budget=budget)

    def row_counts(self, length: int) -> tuple[int, ...]:
        """Row counts for rows of `length`, descending: a full batch, a quarter, one."""
        full = max(1, self.budget // length)
        return tuple(sorted({full, max(1, full // 4), 1}, reverse=True))

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every (rows, length) that `pack` can produce; small ones first."""
        short = tuple((1, length) for length in range(BLOCK, self.lengths[0], BLOCK))
        return short + tuple((rows, length) for length in self.lengths for rows in reversed(self.row_counts(length)))


def pack(ids: NDArray[np.int64], lengths: NDArray[np.int64], ladder: Ladder, *, streams: int = 1) -> list[Batch]:
    """Pack pieces into batches of the ladder's shapes.

    Pieces are placed longest first into the fullest open row that still has room (best-fit decreasing). A batch's
    content depends on the arguments alone, so the same window of texts always gives the same batches.

    Args:
        ids: int64 [sum of lengths], the pieces' tokens one after another.
        lengths: int64 [pieces], each between 1 and the ladder's longest row.
        ladder: the shapes.
        streams: how many batches run at once; the last ones are cut small so that all streams finish together.

    Returns:
        The batches, longest rows first, covering every piece once.
    """
    if lengths.size == 0:
        return []
    total = int(lengths.sum())
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    # Few short texts: one row just long enough, for latency.
    length = max(_blocks(total), _blocks(TOKENS_PER_SLOT * lengths.size))
    if length <= ladder.lengths[0]:
        return [_fill(ids, starts, lengths, [list(range(lengths.size))], 1, length)]
    batches: list[Batch] = []
    for length, rows in _rows(lengths.tolist(), ladder).items():
        at = 0
        for count in _counts(len(rows), ladder.row_counts(length), streams):
            batches.append(_fill(ids, starts, lengths, rows[at : at + count], count, length))
            at += count
    return batches


def _rows(lengths: Sequence[int], ladder: Ladder) -> dict[int, list[list[int]]]:
    """Assign pieces to rows; returns the rows by row length, longest first."""
    rows: dict[int, list[list[int]]] = {length: [] for length in reversed(ladder.lengths)}
    # Open rows by free space, so that the tightest fit is found without looking at rows that are too full.
    open_rows: list[list[tuple[list[int], int]]] = [[] for _ in range(ladder.lengths[-1] + 1)]
    roomiest = 0  # no open row has more free space than this
    for piece in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        size = lengths[piece]
        for space in range(size, roomiest + 1):
            if open_rows[space]:
                row, slots = open_rows[space].pop()
                break
        else:
            space = next(length for length in ladder.lengths if length >= size)
            row, slots = [], space // TOKENS_PER_SLOT
            rows[space].append(row)
        row.append(piece)
        left = space - size
        if left > 0 and slots > 1:
            open_rows[left].append((row, slots - 1))
            roomiest = max(roomiest, left)
    return rows


def _counts(rows: int, sizes: Sequence[int], streams: int) -> list[int]:
    """Cut a number of rows into batches of the given sizes (descending, ending in 1); the last may be part empty."""
    counts: list[int] = []
    for rank, size in enumerate(sizes):
        if rank > 1 and rows < sizes[rank - 1] and 4 * rows >= 3 * sizes[rank - 1]:
            return [*counts, sizes[rank - 1]]  # one nearly full batch is cheaper than several of the next size
        # Full batches only while there is one for every stream; the rest is cut smaller.
        keep = size * streams if rank == 0 and size > 1 else size
        while rows >= keep:
            counts.append(size)
            rows -= size
    return counts


def _fill(
    ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    rows: Sequence[Sequence[int]],
    count: int,
    length: int,
) -> Batch:
    """Lay the pieces of some rows out as the engine's arrays [count, length]."""
    pieces = np.fromiter((piece for row in rows for piece in row), np.int64)
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    slot_of = np.fromiter((slot for row in rows for slot in range(len(row))), np.int64)
    sizes = lengths[pieces]
    before = np.cumsum(sizes) - sizes  # tokens ahead of each piece in this batch
    row_before = before[slot_of == 0][row_of]  # tokens ahead of its row
    within = np.arange(sizes.sum()) - np.repeat(before, sizes)
    source = np.repeat(starts[pieces], sizes) + within
    target = np.repeat(row_of * length + before - row_before, sizes) + within
    arrays = np.zeros((3, count * length), np.int64)
    arrays[0, target] = ids[source]
    arrays[1, target] = within
    arrays[2, target] = np.repeat(slot_of + 1, sizes)
    input_ids, position_ids, segment_ids = arrays.reshape(3, count, length)
    return Batch(
        rows=PackedRows(input_ids=input_ids, position_ids=position_ids, segment_ids=segment_ids),
        pieces=pieces,
        slots=row_of * (length // TOKENS_PER_SLOT) + slot_of,
        tokens=int(sizes.sum()),
    )


def _blocks(tokens: int) -> int:
    """Round up to a whole number of blocks."""
    return -(-tokens // BLOCK) * BLOCK
