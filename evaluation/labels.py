"""Labelled texts: a linear classifier on frozen vectors, and clusters beside labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.sets import check_fields, read_rows
from evaluation.statistics import Bootstrap, Result
from evaluation.vectors import Encode, unit_vectors
from mirror_runtime.errors import InputError
from mirror_runtime.extras import require

FOLDS = 10
TRAIN, TEST = "-train", "-test"
"""Ends of the names of two files that belong together."""

Labels = NDArray[np.str_]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Texts with a class each."""

    name: str
    texts: tuple[str, ...]
    labels: Labels  # [texts]
    tested: int = 0  # the last so many texts are the test part; 0 means cross-validation


def read_labelled(path: str) -> Labelled:
    """Read a file with the header `label<TAB>text`. With `NAME-train.tsv`, `NAME-test.tsv` beside it is the test part.

    Raises:
        InputError: a file cannot be read, a line has another number of columns, there is one class only, or a class of
            a file without test part has fewer texts than folds.
    """
    file = Path(path)
    labels, texts = _read(file)
    tested = 0
    beside = file.with_name(file.name.replace(TRAIN, TEST))
    if beside != file and beside.is_file():
        more = _read(beside)
        labels, texts, tested = labels + more[0], texts + more[1], len(more[0])
    trained = labels[: len(labels) - tested]
    names, counts = np.unique(trained, return_counts=True)
    if len(names) < 2:
        raise InputError(f"{file} has the label {names[0]!r} only: a classifier needs two or more")
    if not tested and counts.min() < FOLDS:
        rare = names[counts.argmin()]
        raise InputError(f"{file} has {counts.min()} texts of {rare!r}: {FOLDS}-fold validation needs {FOLDS} of each")
    name = file.stem.removesuffix(TRAIN) if tested else file.stem
    return Labelled(name=name, texts=tuple(texts), labels=np.array(labels), tested=tested)


def evaluate_labels(one: Labelled, encode: Encode, bootstrap: Bootstrap) -> list[Result]:
    """Measure the accuracy of a logistic regression on unit vectors, scaled to unit variance: L2, C = 1."""
    linear, chosen, chain, scale = (
        require(f"sklearn.{module}", "train")
        for module in ("linear_model", "model_selection", "pipeline", "preprocessing")
    )
    model = chain.make_pipeline(scale.StandardScaler(), linear.LogisticRegression(max_iter=1000))
    (vectors,) = unit_vectors(encode, one.texts)
    if one.tested:
        cut = len(vectors) - one.tested
        found, labels = model.fit(vectors[:cut], one.labels[:cut]).predict(vectors[cut:]), one.labels[cut:]
    else:
        folds = chosen.StratifiedKFold(FOLDS, shuffle=True, random_state=bootstrap.seed)
        found, labels = chosen.cross_val_predict(model, vectors, one.labels, cv=folds), one.labels
    return [bootstrap.mean("classification", one.name, "accuracy", found == labels)]


def evaluate_clusters(one: Labelled, encode: Encode, bootstrap: Bootstrap) -> list[Result]:
    """Measure how well k-means with a cluster for each label finds the labels: v-measure (Rosenberg, Hirschberg)."""
    (vectors,) = unit_vectors(encode, one.texts)
    labels = np.unique(one.labels, return_inverse=True)[1]
    count, n = int(labels.max()) + 1, len(labels)
    means = require("sklearn.cluster", "train").KMeans(count, n_init=3, random_state=bootstrap.seed)
    cells = labels * count + means.fit_predict(vectors)
    rng = bootstrap.rng()
    # Texts are drawn, not cells: the same ones for every encoder. The first row is the sample itself.
    times = [np.ones(n), *(rng.multinomial(n, np.full(n, 1 / n)) for _ in range(bootstrap.resamples))]
    tables = np.array([np.bincount(cells, weights, count * count) for weights in times]).reshape(-1, count, count)
    value, *resampled = 100 * v_measure(tables)
    return [bootstrap.result("clustering", one.name, "v-measure", float(value), np.array(resampled), n)]


def v_measure(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the harmonic mean of homogeneity and completeness, 0 to 1, of counts [n, labels, clusters]."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    joint = _entropy(shares.reshape(len(shares), -1))
    labels, clusters = _entropy(shares.sum(axis=2)), _entropy(shares.sum(axis=1))
    values: NDArray[np.float64] = 2 * (labels + clusters - joint) / np.maximum(labels + clusters, 1e-12)
    return values


def _entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
    return values


def _read(file: Path) -> tuple[list[str], list[str]]:
    (_, header), *rows = table = read_rows(file)
    if [field.strip().lower() for field in header[:2]] != ["label", "text"]:
        raise InputError(f"{file}, line 1: expected the header label<TAB>text, found {' '.join(header)[:60]!r}")
    check_fields(file, table)
    for number, fields in rows:
        if not fields[0].strip() or not fields[1].strip():
            raise InputError(f"{file}, line {number}: expected label<TAB>text, neither empty")
    return [fields[0].strip() for _, fields in rows], [fields[1].strip() for _, fields in rows]
