"""What changed forms of the same texts cost: typos, capitals, white space, word order."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from evaluation.perturb import PERTURBATIONS
from evaluation.sets import EvaluationSet
from evaluation.statistics import Bootstrap, Result
from evaluation.vectors import Encode, pair_cosines, unit_vectors


def evaluate_robustness(one: EvaluationSet, encode: Encode, bootstrap: Bootstrap) -> list[Result]:
    """Measure, for each change to all texts of scored pairs, the Spearman correlation that it costs and its cosine.

    The cosine is the mean over texts of text and changed text, times 100.
    """
    texts = list(one.texts)
    rng = random.Random(bootstrap.seed)
    changed = {name: [change(text, rng) for text in texts] for name, change in PERTURBATIONS.items()}
    clean, *others = unit_vectors(encode, texts, *changed.values())
    pairs = len(one.scores)

    def measured(vectors: NDArray[np.float32]) -> Result:
        cosines = pair_cosines(vectors[:pairs], vectors[pairs:])
        return bootstrap.spearman("robustness", one.name, "Spearman", cosines, one.scores)

    whole, results = measured(clean), []
    for name, vectors in zip(changed, others, strict=True):
        title, part = f"{one.name}, {name}", measured(vectors)
        value, drawn = whole.figure.value - part.figure.value, whole.resampled - part.resampled
        results.append(bootstrap.result("robustness", title, "Spearman lost", value, drawn, pairs))
        results.append(bootstrap.mean("robustness", title, "cosine", (clean * vectors).sum(axis=1)))
    return results
