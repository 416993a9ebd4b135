"""Which row of an output, and of a result, a piece becomes, or each of its tokens where each has a vector."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.packing import PackedBatch, ranges, with_token_slots, with_token_types
from mirror_runtime.tokenizer import Tokenized


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
