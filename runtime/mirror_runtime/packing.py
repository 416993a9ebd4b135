"""Token ids to packed rows, and slots back to pieces: the idea that runs through the house.

A batch is R rows of L tokens, each row holding several pieces one after another, told apart by segment ids. The row
lengths and row counts come from a short `ShapeSet`, so that an engine compiles few static shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import TOKENS_PER_SLOT

BLOCK = 16
"""Row lengths are multiples of this: engines' attention kernels are slow for others."""

ROW_TOKENS = 64
"""Length of the everyday row, where no plan says otherwise."""

TOKEN_BUDGET = 1024
"""Tokens of a full batch: enough to keep matrix products at their rate, small enough to stay in cache."""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The three inputs of a packed graph, each int64 [R, L].

    Attributes:
        input_ids: token ids; 0 where empty.
        position_ids: 0, 1, … within each piece; 0 where empty.
        segment_ids: 1, 2, … for the pieces of a row; 0 where empty. Padding that belongs to a piece, which
            `mean_padded` alone has, carries the piece's number with a minus: it sees the piece and nothing sees it.
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
class ShapeSet:
    """The static shapes an encoder runs in.

    Attributes:
        lengths: row lengths, ascending; each is double the one before, the first is the everyday one.
        budget: tokens of a full batch.
        step: lengths of more than two blocks are whole multiples of it.
        between: lengths between those of `lengths`, ascending, for full batches alone: see `for_bulk`.
    """

    lengths: tuple[int, ...]
    budget: int = TOKEN_BUDGET
    step: int = BLOCK
    between: tuple[int, ...] = ()

    @staticmethod
    def up_to(max_tokens: int, *, base: int = ROW_TOKENS, budget: int = TOKEN_BUDGET, step: int = BLOCK) -> ShapeSet:
        """Build the ladder for pieces of up to `max_tokens`: base, 2 base, … and the first that holds them all.

        The last length is cut to the next multiple of the step, so that 384 does not cost 512.
        """
        lengths = [_row_length(base, step)]
        while lengths[-1] < max_tokens:
            lengths.append(min(2 * lengths[-1], _row_length(max_tokens, step)))
        return ShapeSet(lengths=tuple(lengths), budget=budget, step=step)

    def row_length(self, tokens: int) -> int:
        """Give the shortest length that a row of so many tokens may have."""
        return _row_length(tokens, self.step)

    def for_bulk(self) -> ShapeSet:
        """Give the ladder for many texts: this one, and lengths half and three quarters of the way to each.

        Where those double, that is three quarters and seven eighths of each, in whole steps.

        Texts of like lengths leave rows emptier than ragged ones do: of 40 tokens only one fits into 64. Where there
        are full batches of such rows for every stream, shorter ones are worth the shapes that they cost.
        """
        between = set()
        for low, high in zip((self.lengths[0] // 2, *self.lengths[:-1]), self.lengths, strict=True):
            shorter = {self.row_length(high - (high - low) // part) for part in (2, 4)}
            between |= {length for length in shorter if low < length < high}
        return replace(self, between=tuple(sorted(between)))

    def row_counts(self, length: int) -> tuple[int, ...]:
        """Row counts for rows of `length`, descending: a full batch, a quarter, one; between a full batch alone."""
        full = max(1, self.budget // length)
        return (full,) if length in self.between else tuple(sorted({full, max(1, full // 4), 1}, reverse=True))

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every (rows, length) that `pack` can produce; small ones first."""
        short = {self.row_length(tokens) for tokens in range(BLOCK, self.lengths[0], BLOCK)} - {self.lengths[0]}
        lengths = sorted(self.lengths + self.between)
        return (
            *((1, length) for length in sorted(short)),
            *((rows, length) for length in lengths for rows in reversed(self.row_counts(length))),
        )


def pack(
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    ladder: ShapeSet,
    *,
    streams: int = 1,
    own: NDArray[np.int64] | None = None,
) -> list[Batch]:
    """Pack pieces into batches of the ladder's shapes.

    Pieces are placed longest first into the fullest open row that still has room (best-fit decreasing). A batch's
    content depends on the arguments alone, so the same window of texts always gives the same batches.

    Args:
        ids: int64 [sum of lengths], the pieces' tokens one after another.
        lengths: int64 [pieces], each between 1 and the ladder's longest row.
        ladder: the shapes.
        streams: how many batches run at once; the last ones are cut small so that all streams finish together.
        own: int64 [pieces], tokens of each piece ahead of its padding; None where no piece has any.

    Returns:
        The batches, longest rows first, single rows last, covering every piece once.
    """
    if lengths.size == 0:
        return []
    # Few short texts: one row just long enough, for latency.
    length = ladder.row_length(max(int(lengths.sum()), TOKENS_PER_SLOT * lengths.size))
    if length <= ladder.lengths[0]:
        return [_row(ids, lengths, length, own)]
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    rows, row_lengths = _assign(lengths[order], ladder)
    if ladder.between:
        rows, row_lengths = _shorten(rows, row_lengths, lengths[order], ladder, streams)
    by_row = np.argsort(rows, kind="stable")  # a row's pieces stay longest first
    order, rows = order[by_row], rows[by_row]
    batches: list[Batch] = []
    opened = 0
    for length in dict.fromkeys(row_lengths):
        # Longer rows have smaller numbers, so that the rows of one length have successive ones.
        count = row_lengths.count(length)
        begin, end = np.searchsorted(rows, (opened, opened + count))
        counts = _counts(count, ladder.row_counts(length), streams)
        batches += _fill(ids, starts, lengths, order[begin:end], rows[begin:end] - opened, counts, length, own)
        opened += count
    # A single row wants all cores, a batch of many one: beside each other both are slower.
    return sorted(batches, key=lambda batch: batch.rows.shape[0] == 1)


def pack_shape(
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    shape: tuple[int, int],
    *,
    own: NDArray[np.int64] | None = None,
) -> Batch:
    """Fill one batch of a shape with the longest pieces that fit; places stay empty where there are too few.

    Texts meet the shapes that their lengths ask for; a proof has to meet them all.

    Args:
        ids: see `pack`.
        lengths: see `pack`, of any length.
        shape: rows and row length.
        own: see `pack`.
    """
    count, length = shape
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] <= length]
    rows, _ = _assign(lengths[order], ShapeSet(lengths=(length,)))
    by_row = np.argsort(rows, kind="stable")
    order, rows = order[by_row], rows[by_row]
    held = slice(np.searchsorted(rows, count))  # rows beyond the batch are left out
    starts = np.cumsum(lengths) - lengths
    (batch,) = _fill(ids, starts, lengths, order[held], rows[held], [count], length, own)
    return batch


def _assign(sizes: NDArray[np.int64], ladder: ShapeSet) -> tuple[NDArray[np.int64], list[int]]:
    """Assign pieces, given in descending size, to rows, all pieces of one size at once.

    Returns:
        int64 [pieces], each piece's row; and the rows' lengths, longest first.
    """
    rows = np.empty(sizes.size, np.int64)
    row_lengths: list[int] = []
    # Open rows by free space, and there by free slots: rows of one kind are filled alike.
    open_rows: list[dict[int, list[int]]] = [{} for _ in range(ladder.lengths[-1] + 1)]
    roomiest = 0  # no open row has more free space than this
    distinct, firsts = np.unique(-sizes, return_index=True)
    ends = np.append(firsts, sizes.size)[1:]
    for size, at, end in zip((-distinct).tolist(), firsts.tolist(), ends.tolist(), strict=True):
        placed = at
        for space in range(size, roomiest + 1):  # the tightest rows first
            for slots in sorted(open_rows[space]):
                if placed == end:
                    break
                alike = open_rows[space][slots]
                wanted = -(-(end - placed) // min(space // size, slots))
                chosen, left = alike[-wanted:], alike[:-wanted]
                if left:
                    open_rows[space][slots] = left
                else:
                    del open_rows[space][slots]
                placed = _place(rows, placed, end, chosen, size, space, slots, open_rows)
            if placed == end:
                break
        if placed < end:
            space = next(length for length in ladder.lengths if length >= size)
            slots = space // TOKENS_PER_SLOT
            wanted = -(-(end - placed) // min(space // size, slots))
            fresh = list(range(len(row_lengths), len(row_lengths) + wanted))
            row_lengths += [space] * wanted
            _place(rows, placed, end, fresh, size, space, slots, open_rows)
            roomiest = max(roomiest, space - size)
    return rows, row_lengths


def _place(
    rows: NDArray[np.int64],
    at: int,
    end: int,
    chosen: list[int],
    size: int,
    space: int,
    slots: int,
    open_rows: list[dict[int, list[int]]],
) -> int:
    """Fill rows of equal free space and slots with pieces of one size, and open them again with what is left.

    Returns:
        The first piece that found no room.
    """
    each = min(space // size, slots)
    stop = min(end, at + each * len(chosen))
    rows[at:stop] = np.repeat(chosen, each)[: stop - at]
    whole, rest = divmod(stop - at, each)
    for filled, pieces in ((chosen[:whole], each), (chosen[whole : whole + 1], rest)):
        if filled and space > size * pieces and slots > pieces:
            open_rows[space - size * pieces].setdefault(slots - pieces, []).extend(filled)
    return stop


def _shorten(
    rows: NDArray[np.int64], row_lengths: list[int], sizes: NDArray[np.int64], ladder: ShapeSet, streams: int
) -> tuple[NDArray[np.int64], list[int]]:
    """Shorten rows whose pieces need no more to a length between, as many as give every stream full batches.

    Args:
        rows: int64 [pieces], each piece's row.
        row_lengths: of each row, longest first.
        sizes: int64 [pieces], each piece's tokens.
        ladder: the shapes.
        streams: batches that run at once.

    Returns:
        As `_assign`: rows by their new numbers, and their lengths.
    """
    needed = np.maximum(np.bincount(rows, weights=sizes), np.bincount(rows) * TOKENS_PER_SLOT)
    lengths = np.array(row_lengths)
    for between in ladder.between:  # what one length leaves over is for the next one
        length = next(length for length in ladder.lengths if length > between)
        fitting = np.flatnonzero((lengths == length) & (needed <= between))
        round_of_batches = ladder.row_counts(between)[0] * streams
        lengths[fitting[fitting.size % round_of_batches :]] = between
    order = np.argsort(-lengths, kind="stable")
    numbers = np.empty_like(order)
    numbers[order] = np.arange(order.size)
    return numbers[rows], lengths[order].tolist()


def _counts(rows: int, sizes: Sequence[int], streams: int) -> list[int]:
    """Cut a number of rows into batches of the given sizes (descending, ending in 1); the last may be part empty.

    Batches run one on each stream, single rows on all cores one after the other. So many rows go in rounds of one batch
    a stream: the largest ones while they are full, smaller ones while more than half of the streams have one.
    """
    counts: list[int] = []
    for rank, size in enumerate(sizes):
        least = size * streams if rank == 0 else size * (streams + 1) / 2
        while size > 1 and rows >= least:
            batches = min(streams, -(-rows // size))
            counts += [size] * batches
            rows -= size * batches
    return counts + [1] * rows


def _row(ids: NDArray[np.int64], lengths: NDArray[np.int64], length: int, own: NDArray[np.int64] | None) -> Batch:
    """Lay few pieces out in one row, one after another: what a lone text waits for, so without `_fill`'s sorting.

    Args:
        ids: the pieces' tokens.
        lengths: each piece's tokens.
        length: tokens of the row.
        own: each piece's tokens ahead of its padding; None where no piece has any.
    """
    arrays = np.zeros((3, 1, length), np.int64)
    input_ids, position_ids, segment_ids = arrays
    input_ids[0, : ids.size] = ids
    at = 0
    for number, size in enumerate(lengths.tolist()):
        position_ids[0, at : at + size] = np.arange(size)
        segment_ids[0, at : at + size] = number + 1
        if own is not None:
            segment_ids[0, at + own[number] : at + size] = -(number + 1)
        at += size
    slots = np.arange(lengths.size)
    return Batch(
        rows=PackedRows(input_ids=input_ids, position_ids=position_ids, segment_ids=segment_ids),
        pieces=slots,
        slots=slots,
        tokens=at if own is None else int(own.sum()),
    )


def _fill(
    ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    pieces: NDArray[np.int64],
    rows: NDArray[np.int64],
    counts: Sequence[int],
    length: int,
    own: NDArray[np.int64] | None,
) -> Iterator[Batch]:
    """Lay the pieces of rows 0, 1, … out as the engine's arrays, and cut these into batches of `counts` rows.

    Args:
        ids: every piece's tokens.
        starts: where each piece begins in `ids`.
        lengths: each piece's tokens.
        pieces: int64 [m], those to lay out, row by row.
        rows: int64 [m], their rows, ascending.
        counts: rows of each batch.
        length: tokens of a row.
        own: each piece's tokens ahead of its padding; None where no piece has any.
    """
    sizes = lengths[pieces]
    before = np.cumsum(sizes) - sizes  # tokens ahead of each piece
    first = np.searchsorted(rows, rows)  # the first piece of its row
    slot_of = np.arange(pieces.size) - first
    within = np.arange(sizes.sum()) - np.repeat(before, sizes)
    source = np.repeat(starts[pieces], sizes) + within
    target = np.repeat(rows * length + before - before[first], sizes) + within
    arrays = np.zeros((3, sum(counts) * length), np.int64)
    arrays[0, target] = ids[source]
    arrays[1, target] = within
    arrays[2, target] = np.repeat(slot_of + 1, sizes)
    if own is not None:
        arrays[2, target[within >= np.repeat(own[pieces], sizes)]] *= -1
    arrays = arrays.reshape(3, -1, length)
    row = 0
    for count in counts:
        begin, end = np.searchsorted(rows, (row, row + count))
        input_ids, position_ids, segment_ids = arrays[:, row : row + count]
        yield Batch(
            rows=PackedRows(input_ids=input_ids, position_ids=position_ids, segment_ids=segment_ids),
            pieces=pieces[begin:end],
            slots=(rows[begin:end] - row) * (length // TOKENS_PER_SLOT) + slot_of[begin:end],
            tokens=int((lengths if own is None else own)[pieces[begin:end]].sum()),
        )
        row += count


def _row_length(tokens: int, step: int) -> int:
    """Round up to a whole number of blocks, and beyond two of them of steps."""
    multiple = BLOCK if tokens <= 2 * BLOCK else step
    return -(-tokens // multiple) * multiple
