"""From pieces to rows of batches, and from their outputs to a result: a vector a text, or one a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.chunks import join
from mirror_runtime.encoded import Encoded
from mirror_runtime.errors import NotFiniteError
from mirror_runtime.packing import PackedBatch, ranges, with_token_slots, with_token_types
from mirror_runtime.tokenizer import Tokenized
from mirror_runtime.vectors import Vectors, dtype_of, rows_not_finite, width_of


def tokens_of(tokenized: Tokenized, pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where in `ids` the tokens of some pieces are, piece after piece."""
    lengths = tokenized.lengths
    return ranges((np.cumsum(lengths) - lengths)[pieces], lengths[pieces])


def locate(batch: PackedBatch, tokenized: Tokenized, *, per_token: bool) -> PackedBatch:
    """Complete a batch: a pair's token types, and where the vectors of tokens will be if each has one."""
    if per_token:
        return with_token_slots(batch, tokens_of(tokenized, batch.pieces))
    return with_token_types(batch, tokenized.first_lengths)


def result_rows(tokenized: Tokenized, *, per_token: bool) -> NDArray[np.int64]:
    """Return the row of the result that each piece, or each token, becomes; -1 in texts of several parts."""
    whole = np.bincount(tokenized.part_text, minlength=len(tokenized.tokens))[tokenized.part_text] == 1
    to, of = tokenized.part_text[whole], tokenized.part_piece[whole]
    if per_token:
        counts = tokenized.kept_tokens
        to, of = ranges((np.cumsum(counts) - counts)[to], tokenized.lengths[of]), tokens_of(tokenized, of)
    found = np.full((tokenized.ids if per_token else tokenized.lengths).size, -1)
    found[of] = to
    return found


def collect(
    tokenized: Tokenized, batches: Sequence[PackedBatch], outputs: Sequence[Vectors], spec: EncoderSpec
) -> Encoded:
    """Put the vectors of batches, [m, width] each, together to those of texts. One that is not finite is an error."""
    size = (tokenized.ids if spec.per_token else tokenized.lengths).size
    found = np.zeros((size, width_of(spec)), dtype_of(spec))
    for batch, output in zip(batches, outputs, strict=True):
        found[batch.pieces] = output
    counts = None
    if spec.per_token:
        vectors, counts = found[tokens_of(tokenized, tokenized.part_piece)], tokenized.kept_tokens
    else:
        vectors = join(found[tokenized.part_piece], tokenized, spec)
    errors = dict(tokenized.errors)
    if bad := rows_not_finite(vectors):
        owners = np.repeat(np.arange(len(tokenized.tokens)), 1 if counts is None else counts)
        errors |= {at: NotFiniteError(at) for at in owners[bad].tolist()}
        vectors[np.isin(owners, owners[bad])] = 0
    return Encoded(
        vectors=vectors, tokens=tokenized.tokens, truncated=tokenized.truncated, errors=errors, counts=counts
    )
