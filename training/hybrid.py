"""Scores of titles and texts by the base and by words: what an encoder learns from its own documents without labels."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.pooling import project
from encoders.reference import Reference
from evaluation.retrieval import Scores, WordScores
from evaluation.vectors import Encode, unit_vectors
from training.augment import Document
from training.packed import encode_packed, pack, row_length

CHUNK = 16_000_000
"""Scores in memory at once while their scale is measured: 128 MB an array."""

LEXICAL = 0.4
"""Weight of BM25 beside the cosine: 0.3 to 0.5 ranked Cranfield's documents best (docs/log.md, 2026-11-30)."""


class HybridScores:
    """The base's cosines of titles and texts, mixed with BM25: a ranking that is better than either.

    For each title, both are put on one scale by their mean and deviation over all texts; their weighted mean then
    gets the deviation that cosines have. Indexing with n documents gives their scores, float32 [n titles, n texts].

    Args:
        base: the encoder before tuning. Texts are cut to `max_tokens`, and encoded in the caller's precision.
        documents: what is tuned on.
        max_tokens: a text's limit.
    """

    def __init__(self, base: Reference, documents: Sequence[Document], max_tokens: int) -> None:
        titles, texts = zip(*documents, strict=True)
        self._titles, self._texts = unit_vectors(_packed_encoder(base, max_tokens), titles, texts)
        self._words = WordScores(texts, titles)
        # Over all texts: where no text of a sample had a word of the title, the deviation would be zero.
        moments = [
            [(one.mean(1, keepdims=True), one.std(1, keepdims=True) + 1e-9) for one in self._parts(rows, slice(None))]
            for rows in np.array_split(np.arange(len(texts)), -(-(len(texts) ** 2) // CHUNK))
        ]
        self._scales = [tuple(map(np.concatenate, zip(*one, strict=True))) for one in zip(*moments, strict=True)]
        self._spread = float(self._scales[0][1].mean())

    def _parts(self, rows: NDArray[np.int64], columns: NDArray[np.int64] | slice) -> tuple[Scores, Scores]:
        return self._titles[rows] @ self._texts[columns].T, self._words.scores(rows, columns)

    def __getitem__(self, chosen: Sequence[int]) -> torch.Tensor:
        rows = np.asarray(chosen)
        cosines, words = (
            (part - mean[rows]) / deviation[rows]
            for part, (mean, deviation) in zip(self._parts(rows, rows), self._scales, strict=True)
        )
        return torch.from_numpy((((1 - LEXICAL) * cosines + LEXICAL * words) * self._spread).astype(np.float32))

    def order(self, size: int, rng: random.Random) -> list[int]:
        """Return the documents in an order whose batches of `size` hold alike texts; the last ones fill no batch.

        A batch is a random document and the nearest ones that are left: among others, ranking would teach little.
        """
        left = np.ones(len(self._texts), dtype=bool)
        groups: list[list[int]] = []
        while (rest := np.flatnonzero(left)).size >= size:
            near = self._texts[rest] @ self._texts[rest[rng.randrange(rest.size)]]
            groups.append(rest[np.argsort(-near, kind="stable")[:size]].tolist())
            left[groups[-1]] = False
        rng.shuffle(groups)
        return [one for group in groups for one in group]


def _packed_encoder(reference: Reference, max_tokens: int) -> Encode:
    """Return an encoder of texts of up to `max_tokens`, in packed rows: several times as fast as padded ones."""
    spec = dataclasses.replace(reference.spec, max_tokens=min(max_tokens, reference.spec.max_tokens))
    reference = dataclasses.replace(reference, spec=spec)

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        ids = reference.tokenize(texts)
        length, pad_id = row_length(spec.pad_to or max(map(len, ids))), int(reference.tokenizer.pad_token_id)
        with torch.inference_mode():
            packed = pack(ids, length=length, pad_id=pad_id, pad_to=spec.pad_to)
            pooled = encode_packed(reference.model, packed, spec.pooling, spec.layers)
            vectors: NDArray[np.float32] = project(pooled, reference.dense)[:, : spec.dim].float().cpu().numpy()
        return vectors

    return encode
