"""What changed forms of the same texts cost: typos, capitals, white space, word order."""

from __future__ import annotations

import random

from evaluation.perturb import PERTURBATIONS
from evaluation.sets import EvaluationSet
from evaluation.statistics import Bootstrap, Result, resample_spearman, spearman
from evaluation.vectors import DECIMALS, Encode, unit_vectors


def evaluate_robustness(one: EvaluationSet, encode: Encode, bootstrap: Bootstrap) -> list[Result]:
    """Measure, for each change to all texts of scored pairs, the Spearman correlation that it costs and its cosine.

    The cosine is the mean over texts of text and changed text, times 100.
    """
    texts = list(one.texts)
    rng = random.Random(bootstrap.seed)
    changed = {name: [change(text, rng) for text in texts] for name, change in PERTURBATIONS.items()}
    clean, *others = unit_vectors(encode, texts, *changed.values())
    pairs = len(one.scores)
    results, whole = [], None
    for name, vectors in (("", clean), *zip(changed, others, strict=True)):
        cosines = (vectors[:pairs] * vectors[pairs:]).sum(axis=1).round(DECIMALS)
        drawn = 100 * resample_spearman(cosines, one.scores, bootstrap.resamples, bootstrap.rng())
        value = 100 * spearman(cosines, one.scores)
        if whole is None:
            whole = value, drawn
            continue
        title = f"{one.name}, {name}"
        lost = bootstrap.result("robustness", title, "Spearman lost", whole[0] - value, whole[1] - drawn, pairs)
        results += [lost, bootstrap.mean("robustness", title, "cosine", (clean * vectors).sum(axis=1))]
    return results
