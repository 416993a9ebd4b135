"""Join the vectors of a long text's chunks to one vector."""

from __future__ import annotations

import numpy as np

from mirror_runtime.bundle import EncoderSpec
from mirror_runtime.tokenizer import Tokenized
from mirror_runtime.vectors import Vectors, components, round_vectors, unit_rows


def join(parts: Vectors, tokenized: Tokenized, spec: EncoderSpec) -> Vectors:
    """Combine the vectors [parts, width] of texts' parts into one vector a text, [texts, width].

    Chunks become their mean, computed on components, normalised if the encoder normalises, in its vector type.
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
        sums = np.zeros((texts, spec.dim), np.float32)
        np.add.at(sums, part_text[~single], components(parts[~single], spec))
        means = sums[several] / counts[several, None]
        if spec.normalize:
            means = unit_rows(means)
        vectors[several] = round_vectors(means, spec)
    return vectors
