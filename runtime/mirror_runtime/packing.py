"""Pack pieces of token ids into rows, and find each piece's vector in the output.

A batch is R rows of L tokens. Each row holds several pieces one after another, told apart by segment ids. Row lengths
and row counts come from a small `ShapeSet`, so an engine compiles few static shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import TOKENS_PER_SLOT

BLOCK = 16
"""Row lengths are multiples of this: engines' attention kernels are slow at other lengths."""

ROW_TOKENS = 64
"""Default length of a row: that of most batches."""

TOKEN_BUDGET = 1024
"""Tokens of a full batch: enough to keep matrix products at their rate, small enough to stay in cache."""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The inputs of a packed graph, each int64 [R, L].

    Attributes:
        input_ids: token ids; 0 where empty.
        position_ids: 0, 1, … within each piece; 0 where empty.
        segment_ids: 1, 2, … for the pieces of a row; 0 where empty. Padding that belongs to a piece, which only
            `mean_padded` has, carries the negated number: it attends to the piece, and nothing attends to it.
        token_type_ids: 1 on the second text of a pair, else 0; None where pieces are texts.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of rows and their length."""
        rows, length = self.input_ids.shape
        return rows, length

    @property
    def run_ends(self) -> NDArray[np.int32]:
        """Return where each piece and each row's empty rest ends, as cumulative numbers of tokens that start with 0.

        int32 [`runs` + 1], filled up with the number of all tokens: one size for each shape.
        """
        rows, length = self.shape
        changes = np.ones((rows, length), np.bool_)
        changes[:, 1:] = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        starts = np.flatnonzero(changes)
        ends = np.full(runs(self.shape) + 1, rows * length, np.int32)
        ends[: starts.size] = starts
        return ends

    query_lengths = key_value_lengths = run_ends  # the names of a graph's inputs, see export/tensorrt/ragged.py


def runs(shape: tuple[int, int]) -> int:
    """Return how many pieces and empty rests rows of a shape have at most."""
    rows, length = shape
    return rows * (length // TOKENS_PER_SLOT + 1)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Packed rows, and where the engine's output holds each piece's vector."""

    rows: PackedRows
    pieces: NDArray[np.int64]  # [m], the pieces in this batch
    slots: NDArray[np.int64]  # [m], the flat index of each piece's vector in the engine's output [R * (L // 4)]
    tokens: int  # in the rows, without padding


@dataclass(frozen=True, kw_only=True)
class ShapeSet:
    """The static shapes that an encoder runs in."""

    lengths: tuple[int, ...]  # of rows, ascending; each is twice the one before, except the last and in `one_a_row`
    budget: int = TOKEN_BUDGET  # tokens of a full batch
    length_multiple: int = BLOCK  # lengths of more than two blocks are multiples of it
    intermediate_lengths: tuple[int, ...] = ()  # ascending, for full batches only: see `with_intermediate`
    alone: bool = False  # whether a row holds one piece only: see `one_a_row`

    @staticmethod
    def up_to(
        max_tokens: int, *, base: int = ROW_TOKENS, budget: int = TOKEN_BUDGET, length_multiple: int = BLOCK
    ) -> ShapeSet:
        """Build the shapes for pieces of up to `max_tokens`: base, 2 base, … up to the first that holds every piece.

        The last length is only as long as needed, so that 384 tokens do not cost 512.
        """
        lengths = [_row_length(base, length_multiple)]
        while lengths[-1] < max_tokens:
            lengths.append(min(2 * lengths[-1], _row_length(max_tokens, length_multiple)))
        return ShapeSet(lengths=tuple(lengths), budget=budget, length_multiple=length_multiple)

    def __str__(self) -> str:
        if self.alone:
            return f"one text, batches of {self.budget}"
        intermediate = ", ".join(map(str, self.intermediate_lengths))
        in_bulk = f" (many of a kind: {intermediate})" if intermediate else ""
        return f"{', '.join(map(str, self.lengths))} tokens{in_bulk}, batches of {self.budget}"

    def row_length(self, tokens: int) -> int:
        """Return the shortest allowed length of a row that holds so many tokens."""
        return _row_length(tokens, self.length_multiple)

    def with_intermediate(self) -> ShapeSet:
        """Return these shapes with lengths half and three quarters of the way to each length, for many texts.

        Where lengths double, these are three quarters and seven eighths of each, rounded up to a multiple.

        Texts of similar lengths leave rows emptier than ragged ones do: of 40 tokens only one fits into 64. Where such
        rows fill a batch for every stream, shorter rows are worth their extra shapes. Rows of one piece have them all.
        """
        if self.alone:
            return self
        intermediate = set()
        for low, high in zip((self.lengths[0] // 2, *self.lengths[:-1]), self.lengths, strict=True):
            shorter = {self.row_length(high - (high - low) // part) for part in (2, 4)}
            intermediate |= {length for length in shorter if low < length < high}
        return replace(self, intermediate_lengths=tuple(sorted(intermediate)))

    def one_a_row(self) -> ShapeSet:
        """Return shapes for one piece a row, with the lengths between as well, since no neighbours fill a row.

        The shape that a piece runs in follows from its length alone, and it stands at the start of its row. So its
        arithmetic is the same whatever else is encoded. Batches have a quarter of the tokens, because a piece alone
        costs as much as a full one.
        """
        short = map(self.row_length, range(BLOCK, self.lengths[0], BLOCK))
        lengths = {*short, *self.lengths, *self.with_intermediate().intermediate_lengths}
        return replace(self, lengths=tuple(sorted(lengths)), budget=max(1, self.budget // 4), alone=True)

    def row_counts(self, length: int) -> tuple[int, ...]:
        """Return the row counts for rows of `length`, descending: a full batch, a quarter of one, and one row.

        Intermediate lengths, and rows of one piece, have full batches only.
        """
        full = max(1, self.budget // length)
        if self.alone or length in self.intermediate_lengths:
            return (full,)
        return tuple(sorted({full, max(1, full // 4), 1}, reverse=True))

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Return every (rows, length) that `pack` can produce, small ones first."""
        short = {self.row_length(tokens) for tokens in range(BLOCK, self.lengths[0], BLOCK)} - {self.lengths[0]}
        lengths = sorted(self.lengths + self.intermediate_lengths)
        return (
            *((1, length) for length in sorted(short)),
            *((rows, length) for length in lengths for rows in reversed(self.row_counts(length))),
        )


def pack(
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    shape_set: ShapeSet,
    *,
    streams: int = 1,
    unpadded_lengths: NDArray[np.int64] | None = None,
) -> list[PackedBatch]:
    """Pack pieces into batches of the given shapes, longest rows first and single rows last.

    Pieces are placed longest first into the fullest open row that still has room (best-fit decreasing). The batches
    depend on the arguments alone: the same texts always give the same batches.

    Args:
        ids: [sum of lengths], the pieces' tokens one after another.
        lengths: [pieces], each between 1 and the longest row length.
        shape_set: the shapes.
        streams: batches that run at once; the last ones are cut small so that all streams finish together.
        unpadded_lengths: [pieces], tokens of each piece before its padding; None if nothing is padded.
    """
    if lengths.size == 0:
        return []
    if shape_set.alone:
        return list(_pack_alone(ids, lengths, shape_set, unpadded_lengths))
    # Few short texts: one row just long enough, for latency.
    length = shape_set.row_length(max(int(lengths.sum()), TOKENS_PER_SLOT * lengths.size))
    if length <= shape_set.lengths[0]:
        return [_row(ids, lengths, length, unpadded_lengths)]
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    rows, row_lengths = _assign(lengths[order], shape_set)
    if shape_set.intermediate_lengths:
        rows, row_lengths = _shorten(rows, row_lengths, lengths[order], shape_set, streams)
    by_row = np.argsort(rows, kind="stable")  # a row's pieces stay longest first
    order, rows = order[by_row], rows[by_row]
    batches: list[PackedBatch] = []
    opened = 0
    for length in dict.fromkeys(row_lengths):
        # Rows are numbered longest first, so the rows of one length have consecutive numbers.
        count = row_lengths.count(length)
        begin, end = np.searchsorted(rows, (opened, opened + count))
        counts = _counts(count, shape_set.row_counts(length), streams)
        batches += _fill(
            ids, starts, lengths, order[begin:end], rows[begin:end] - opened, counts, length, unpadded_lengths
        )
        opened += count
    # A single row runs on all cores, a batch of many rows on one: side by side, both are slower.
    return sorted(batches, key=lambda batch: batch.rows.shape[0] == 1)


def _pack_alone(
    ids: NDArray[np.int64], lengths: NDArray[np.int64], shape_set: ShapeSet, unpadded: NDArray[np.int64] | None
) -> Iterator[PackedBatch]:
    """Put each piece at the start of a row, in full batches of the shortest length that holds it, see `one_a_row`."""
    starts = np.cumsum(lengths) - lengths
    rank = np.searchsorted(np.array(shape_set.lengths), lengths)
    for at, length in reversed(list(enumerate(shape_set.lengths))):
        pieces = np.flatnonzero(rank == at)
        (count,) = shape_set.row_counts(length)
        counts = [count] * -(-pieces.size // count)
        yield from _fill(ids, starts, lengths, pieces, np.arange(pieces.size), counts, length, unpadded)


def pack_shape(
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    shape: tuple[int, int],
    *,
    unpadded_lengths: NDArray[np.int64] | None = None,
) -> PackedBatch:
    """Fill one batch of a shape with the longest pieces that fit; slots stay empty if there are too few.

    `pack` uses the shapes that suit the pieces; a proof has to run every shape. The arguments are those of `pack`.
    """
    count, length = shape
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] <= length]
    rows, _ = _assign(lengths[order], ShapeSet(lengths=(length,)))
    by_row = np.argsort(rows, kind="stable")
    order, rows = order[by_row], rows[by_row]
    held = slice(np.searchsorted(rows, count))  # rows beyond the batch are dropped
    starts = np.cumsum(lengths) - lengths
    (batch,) = _fill(ids, starts, lengths, order[held], rows[held], [count], length, unpadded_lengths)
    return batch


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """List the numbers from each start on, as many as its length, one range after another."""
    before = np.cumsum(lengths) - lengths
    found: NDArray[np.int64] = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
    return found


def with_token_slots(batch: PackedBatch, tokens: NDArray[np.int64]) -> PackedBatch:
    """Locate the vectors of a batch's tokens in the output of a graph that has one for each place.

    `tokens` are their numbers, piece after piece; they take the place of the pieces.
    """
    return replace(batch, pieces=tokens, slots=np.flatnonzero(batch.rows.segment_ids))


def with_token_types(batch: PackedBatch, first_lengths: NDArray[np.int64] | None) -> PackedBatch:
    """Mark the second text of each pair of a batch; `first_lengths` [pieces] has each pair's tokens before it."""
    if first_lengths is None:
        return batch
    rows, length = batch.rows.shape
    firsts = np.full((rows, 1 + length // TOKENS_PER_SLOT), length)  # by segment; empty positions are segment 0
    slots = batch.slots // (length // TOKENS_PER_SLOT), 1 + batch.slots % (length // TOKENS_PER_SLOT)
    firsts[slots] = first_lengths[batch.pieces]
    types = batch.rows.position_ids >= np.take_along_axis(firsts, batch.rows.segment_ids, axis=1)
    return replace(batch, rows=replace(batch.rows, token_type_ids=types.astype(np.int64)))


def _assign(sizes: NDArray[np.int64], shape_set: ShapeSet) -> tuple[NDArray[np.int64], list[int]]:
    """Assign pieces, in descending size, to rows; return each piece's row, and the rows' lengths, longest first."""
    rows = np.empty(sizes.size, np.int64)
    row_lengths: list[int] = []
    # Open rows by free space and then by free slots: rows that agree in both are filled alike.
    open_rows: list[dict[int, list[int]]] = [{} for _ in range(shape_set.lengths[-1] + 1)]
    most_space = 0  # of any open row
    distinct, firsts = np.unique(-sizes, return_index=True)
    ends = np.append(firsts, sizes.size)[1:]
    for size, at, end in zip((-distinct).tolist(), firsts.tolist(), ends.tolist(), strict=True):
        placed = at
        for space in range(size, most_space + 1):  # the tightest rows first
            for slots in sorted(open_rows[space]):
                if placed == end:
                    break
                alike = open_rows[space][slots]
                needed = -(-(end - placed) // min(space // size, slots))
                chosen, left = alike[-needed:], alike[:-needed]
                if left:
                    open_rows[space][slots] = left
                else:
                    del open_rows[space][slots]
                placed = _place(rows, placed, end, chosen, size, space, slots, open_rows)
            if placed == end:
                break
        if placed < end:
            space = next(length for length in shape_set.lengths if length >= size)
            slots = space // TOKENS_PER_SLOT
            needed = -(-(end - placed) // min(space // size, slots))
            fresh = list(range(len(row_lengths), len(row_lengths) + needed))
            row_lengths += [space] * needed
            _place(rows, placed, end, fresh, size, space, slots, open_rows)
            most_space = max(most_space, space - size)
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
    """Fill rows of equal free space and slots with pieces of one size, and reopen them with what space is left.

    Return the first piece that was not placed.
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
    rows: NDArray[np.int64], row_lengths: list[int], sizes: NDArray[np.int64], shape_set: ShapeSet, streams: int
) -> tuple[NDArray[np.int64], list[int]]:
    """Shorten rows whose pieces fit an intermediate length, as many as give every stream full batches.

    Takes and returns what `_assign` returns: each piece's row, and the rows' lengths, longest first.
    """
    needed = np.maximum(np.bincount(rows, weights=sizes), np.bincount(rows) * TOKENS_PER_SLOT)
    lengths = np.array(row_lengths)
    for shorter in shape_set.intermediate_lengths:  # rows left over by one length may suit the next
        length = next(length for length in shape_set.lengths if length > shorter)
        fitting = np.flatnonzero((lengths == length) & (needed <= shorter))
        rows_a_round = shape_set.row_counts(shorter)[0] * streams
        lengths[fitting[fitting.size % rows_a_round :]] = shorter
    order = np.argsort(-lengths, kind="stable")
    numbers = np.empty_like(order)
    numbers[order] = np.arange(order.size)
    return numbers[rows], lengths[order].tolist()


def _counts(rows: int, sizes: Sequence[int], streams: int) -> list[int]:
    """Split a number of rows into batches of the given sizes (descending, ending in 1); the last may be part empty.

    Each stream runs one batch at a time; single rows run on all cores, one after the other. So rows go in rounds of
    one batch a stream: the largest size while all are full, smaller ones while more than half of the streams get one.
    """
    counts: list[int] = []
    for rank, size in enumerate(sizes):
        least = size * streams if rank == 0 else size * (streams + 1) / 2
        while size > 1 and rows >= least:
            batches = min(streams, -(-rows // size))
            counts += [size] * batches
            rows -= size * batches
    return counts + [1] * rows


def _row(
    ids: NDArray[np.int64], lengths: NDArray[np.int64], length: int, unpadded: NDArray[np.int64] | None
) -> PackedBatch:
    """Put a few pieces into one row, as `_fill` does but without its sorting: a single text waits for this."""
    arrays = np.zeros((3, 1, length), np.int64)
    input_ids, position_ids, segment_ids = arrays
    input_ids[0, : ids.size] = ids
    at = 0
    for number, size in enumerate(lengths.tolist()):
        position_ids[0, at : at + size] = np.arange(size)
        segment_ids[0, at : at + size] = number + 1
        if unpadded is not None:
            segment_ids[0, at + unpadded[number] : at + size] = -(number + 1)
        at += size
    slots = np.arange(lengths.size)
    return PackedBatch(
        rows=PackedRows(input_ids=input_ids, position_ids=position_ids, segment_ids=segment_ids),
        pieces=slots,
        slots=slots,
        tokens=at if unpadded is None else int(unpadded.sum()),
    )


def _fill(
    ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    pieces: NDArray[np.int64],
    rows: NDArray[np.int64],
    counts: Sequence[int],
    length: int,
    unpadded: NDArray[np.int64] | None,
) -> Iterator[PackedBatch]:
    """Write the pieces of rows 0, 1, … into the engine's arrays, and split these into batches of `counts` rows.

    `pieces` [m] are to be written row by row, into `rows` [m], ascending.
    """
    sizes = lengths[pieces]
    before = np.cumsum(sizes) - sizes  # tokens before each piece
    first = np.searchsorted(rows, rows)  # the first piece of its row
    slot_of = np.arange(pieces.size) - first
    within = ranges(np.zeros_like(sizes), sizes)
    source = ranges(starts[pieces], sizes)
    target = ranges(rows * length + before - before[first], sizes)
    arrays = np.zeros((3, sum(counts) * length), np.int64)
    arrays[0, target] = ids[source]
    arrays[1, target] = within
    arrays[2, target] = np.repeat(slot_of + 1, sizes)
    if unpadded is not None:
        arrays[2, target[within >= np.repeat(unpadded[pieces], sizes)]] *= -1
    arrays = arrays.reshape(3, -1, length)
    row = 0
    for count in counts:
        begin, end = np.searchsorted(rows, (row, row + count))
        input_ids, position_ids, segment_ids = arrays[:, row : row + count]
        yield PackedBatch(
            rows=PackedRows(input_ids=input_ids, position_ids=position_ids, segment_ids=segment_ids),
            pieces=pieces[begin:end],
            slots=(rows[begin:end] - row) * (length // TOKENS_PER_SLOT) + slot_of[begin:end],
            tokens=int((lengths if unpadded is None else unpadded)[pieces[begin:end]].sum()),
        )
        row += count


def _row_length(tokens: int, length_multiple: int) -> int:
    """Round up to a multiple of a block, and beyond two blocks to one of `length_multiple`."""
    multiple = BLOCK if tokens <= 2 * BLOCK else length_multiple
    return -(-tokens // multiple) * multiple
