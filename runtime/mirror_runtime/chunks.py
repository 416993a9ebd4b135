"""Join the vectors of a long text's chunks to one vector, as `LongTexts` says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.tokenizer import LongTexts, Tokenized
from mirror_runtime.vectors import Vectors, components, round_vectors, unit_rows


def join(parts: Vectors, tokenized: Tokenized, spec: EncoderSpec) -> Vectors:
    """Combine the vectors [parts, width] of texts' parts into one vector a text, [texts, width].

    Chunks become their mean, weighted mean or maximum, computed on components, normalised if the encoder normalises, in
    its vector type.
    """
    part_text, texts = tokenized.part_text, len(tokenized.tokens)
    counts = np.bincount(part_text, minlength=texts)
    if texts == part_text.size and counts.max(initial=1) == 1:
        return parts
    vectors = np.zeros((texts, parts.shape[1]), parts.dtype)
    single = counts[part_text] == 1
    vectors[part_text[single]] = parts[single]
    several = np.flatnonzero(counts > 1)
    if several.size:
        of, found = np.searchsorted(several, part_text[~single]), components(parts[~single], spec)
        joined: NDArray[Any] = np.zeros((several.size, spec.dim), np.float32)
        if tokenized.long_texts is LongTexts.CHUNK_MAX:
            joined[:] = -np.inf
            np.maximum.at(joined, of, found)
        else:
            weights = np.ones_like(of)
            if tokenized.long_texts is LongTexts.CHUNK_WEIGHTED:
                lengths = tokenized.lengths if tokenized.unpadded_lengths is None else tokenized.unpadded_lengths
                weights = lengths[tokenized.part_piece[~single]]
            np.add.at(joined, of, found * weights[:, None].astype(np.float32))
            joined = joined / np.bincount(of, weights)[:, None]
        vectors[several] = round_vectors(unit_rows(joined) if spec.normalize else joined, spec)
    return vectors
