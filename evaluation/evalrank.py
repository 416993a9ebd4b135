"""EvalRank: a text's paraphrase looked for among all texts of a set of scored pairs (Wang et al. 2022)."""

from __future__ import annotations

import numpy as np

from evaluation.sets import EvaluationSet
from evaluation.statistics import Bootstrap, Result
from evaluation.vectors import Encode, ranks, unit_vectors
from mirror_runtime.errors import InputError

POSITIVE = 0.8
"""Pairs scored at least this share of the set's highest score are paraphrases: 4 of 5 on STS."""

HITS = (1, 3)


def evaluate_rank(one: EvaluationSet, encode: Encode, bootstrap: Bootstrap) -> list[Result]:
    """Measure MRR and hits@k of each paraphrase among all other distinct texts of the set, both texts asking.

    Equal cosines share their mean rank.

    Raises:
        InputError: no two different texts are scored high enough.
    """
    rows = {text: i for i, text in enumerate(dict.fromkeys(one.texts))}
    close = one.scores >= POSITIVE * one.scores.max()
    pairs = [(rows[a], rows[b]) for a, b, near in zip(one.first, one.second, close, strict=True) if near and a != b]
    if not pairs:
        raise InputError(f"{one.name} has no two texts scored {POSITIVE:.0%} of its highest score: leave out --rank")
    (vectors,) = unit_vectors(encode, tuple(rows))
    asking, asked = np.array([*pairs, *(pair[::-1] for pair in pairs)]).T
    found = ranks(vectors[asking], vectors, asked, left_out=asking)
    # Both directions of a pair are one item of the bootstrap.
    both = {"MRR": 1 / found} | {f"hits@{k}": (found <= k).astype(float) for k in HITS}
    return [
        bootstrap.mean("evalrank", one.name, name, items.reshape(2, -1).mean(axis=0)) for name, items in both.items()
    ]
