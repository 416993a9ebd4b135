"""Associations of words or sentences with groups: WEAT (Caliskan et al. 2017) and SEAT (May et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.sets import check_fields, read_rows
from evaluation.statistics import Bootstrap, Result
from evaluation.vectors import Encode, unit_vectors
from mirror_runtime.errors import InputError

LISTS = ("target1", "target2", "attribute1", "attribute2")
"""Of a test: WEAT 1 has flowers, insects, pleasant and unpleasant words."""

MAX_PARTITIONS = 100_000
"""The p-value is over all ways to split the targets in two, or over so many drawn ones where there are more."""


@dataclass(frozen=True, kw_only=True)
class AssociationTest:
    """Two lists of targets of one length, and two of attributes: texts, of words or of sentences that hold them."""

    name: str
    lists: tuple[tuple[str, ...], ...]  # in the order of `LISTS`


def read_association_test(path: str) -> AssociationTest:
    """Read a file with the header `list<TAB>text`, in whose lines the list is one of `LISTS`.

    Raises:
        InputError: it cannot be read, names another list, or its lists of targets are of different lengths or of one.
    """
    file = Path(path)
    (_, header), *rows = table = read_rows(file)
    if [field.strip().lower() for field in header] != ["list", "text"]:
        raise InputError(f"{file}, line 1: expected the header list<TAB>text, found {' '.join(header)[:60]!r}")
    check_fields(file, table)
    found: dict[str, list[str]] = {name: [] for name in LISTS}
    for number, fields in rows:
        name, text = (field.strip() for field in fields)
        if name not in found or not text:
            raise InputError(f"{file}, line {number}: expected one of {', '.join(LISTS)}, a TAB and a text")
        found[name].append(text)
    sizes = [len(texts) for texts in found.values()]
    if min(sizes) < 2 or sizes[0] != sizes[1]:
        raise InputError(
            f"{file} has {', '.join(f'{size} of {name}' for name, size in zip(LISTS, sizes, strict=True))}: "
            "two or more of each are needed, and as many of target1 as of target2"
        )
    return AssociationTest(name=file.stem, lists=tuple(map(tuple, found.values())))


def evaluate_association(one: AssociationTest, encode: Encode, bootstrap: Bootstrap) -> list[Result]:
    """Measure the effect size and the one-sided p-value, both times 100.

    A target's association is its mean cosine to attribute1 less that to attribute2. The effect size is the difference
    of the two targets' mean associations over the deviation of all (-200 to 200; 0 without bias), resampled over each
    list's targets. The p-value, without an interval, is the share of all splits of the targets in half whose difference
    is as large.

    Raises:
        InputError: all associations are equal.
    """
    first, second, pleasant, unpleasant = unit_vectors(encode, *one.lists)
    associations = (np.concatenate([first, second]) @ np.concatenate([pleasant, unpleasant]).T).astype(np.float64)
    values = associations[:, : len(pleasant)].mean(axis=1) - associations[:, len(pleasant) :].mean(axis=1)
    if np.ptp(values) < 1e-9:
        raise InputError(f"every target of {one.name} has one association: the encoder does not distinguish texts")
    half, rng = len(first), bootstrap.rng()
    drawn = np.concatenate(
        [rng.integers(half, size=(bootstrap.resamples, half)) + start for start in (0, half)], axis=1
    )
    resampled = 100 * _effect(values[drawn])
    p_value = 100 * _p_value(values, rng)
    return [
        bootstrap.result("bias", one.name, "effect size", float(100 * _effect(values)), resampled, 2 * half),
        bootstrap.result("bias", one.name, "p-value", p_value, np.full(bootstrap.resamples, p_value), 2 * half),
    ]


def _effect(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return effect sizes of associations [..., targets], those of the first list first."""
    first, second = np.split(values, 2, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        sizes: NDArray[np.float64] = (first.mean(axis=-1) - second.mean(axis=-1)) / values.std(axis=-1, ddof=1)
    return sizes


def _p_value(values: NDArray[np.float64], rng: np.random.Generator) -> float:
    count, half = len(values), len(values) // 2
    if comb(count, half) <= MAX_PARTITIONS:
        chosen = np.array(list(combinations(range(count), half)))
    else:
        drawn = rng.permuted(np.tile(np.arange(count), (MAX_PARTITIONS - 1, 1)), axis=1)[:, :half]
        chosen = np.concatenate([np.arange(half)[None], drawn])  # with the split itself, so that none is zero
    sums = values[chosen].sum(axis=1)
    return float((sums >= values[:half].sum() - 1e-12).mean())
