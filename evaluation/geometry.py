"""Geometry of vectors: the measures that papers on contrastive tuning report."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluation.vectors import ROWS
from mirror_runtime.vectors import SMALLEST_NORM

MAX_TEXTS = 5_000
"""Uniformity compares every pair of at most this many texts; from more, this many are drawn."""

Vectors = NDArray[np.float32]
"""[texts, dim]."""


def alignment(first: Vectors, second: Vectors) -> float:
    """Return the mean squared distance of pairs of unit vectors; lower is better (Wang and Isola, section 4)."""
    return float(((first - second).astype(np.float64) ** 2).sum(axis=1).mean())


def uniformity(vectors: Vectors, rng: np.random.Generator) -> float:
    """Return log E exp(-2 d²) over pairs of different texts; lower is better (Wang and Isola, section 4).

    Of more than `MAX_TEXTS` unit vectors, `rng` draws that many.
    """
    if len(vectors) > MAX_TEXTS:
        vectors = vectors[rng.choice(len(vectors), MAX_TEXTS, replace=False)]
    n = len(vectors)
    total = 0.0
    for start in range(0, n, ROWS):
        cosines = vectors[start : start + ROWS] @ vectors.T
        cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))] = -np.inf  # not with itself
        total += float(np.exp(4 * cosines - 4, out=cosines).sum(dtype=np.float64))  # |x - y|² = 2 - 2 cos
    return float(np.log(total / (n * (n - 1))))


def anisotropy(vectors: Vectors) -> float:
    """Return the mean cosine of two different texts' unit vectors; 0 if directions are spread evenly.

    Every pair counts: the sum of all cosines is the squared length of the sum of vectors.
    """
    n = len(vectors)
    total = vectors.astype(np.float64).sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def mean_norm(vectors: Vectors) -> float:
    """Return the length of the mean of unnormalised vectors, lower is better: MVN in Mirror-BERT's tables 9 and 14."""
    return float(np.linalg.norm(vectors.astype(np.float64).mean(axis=0)))


def isotropy(vectors: Vectors) -> float:
    """Return min Σ exp(c·v) / max Σ exp(c·v) over the eigenvectors c of V'V; higher is better, at most 1.

    IS of unit vectors in Mirror-BERT's tables 9 and 14. An eigenvector's sign is arbitrary: both signs are included.
    """
    values = vectors.astype(np.float64)
    directions = np.linalg.eigh(values.T @ values)[1]
    grown = np.exp(values @ directions)
    sums = np.concatenate([grown.sum(axis=0), (1 / grown).sum(axis=0)])
    return float(sums.min() / sums.max())


def effective_rank(vectors: Vectors) -> float:
    """Return exp of the entropy of the singular values' shares; higher is better, at most dim (Roy and Vetterli)."""
    squares = np.maximum(np.linalg.eigvalsh(vectors.astype(np.float64).T @ vectors.astype(np.float64)), 0)
    shares = np.sqrt(squares) / max(np.sqrt(squares).sum(), SMALLEST_NORM)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def hubness(vectors: Vectors, rng: np.random.Generator, neighbours: int = 10) -> float:
    """Return the skewness of how often a text is among others' ten nearest; lower is better (Radovanović et al.).

    Of more than `MAX_TEXTS` unit vectors, `rng` draws that many. With few texts, half of the others are counted.
    """
    if len(vectors) > MAX_TEXTS:
        vectors = vectors[rng.choice(len(vectors), MAX_TEXTS, replace=False)]
    n = len(vectors)
    nearest = max(1, min(neighbours, (n - 1) // 2))
    counts = np.zeros(n)
    for start in range(0, n, ROWS):
        cosines = vectors[start : start + ROWS] @ vectors.T
        cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))] = -np.inf
        counts += np.bincount(np.argpartition(-cosines, nearest - 1, axis=1)[:, :nearest].ravel(), minlength=n)
    spread = counts - counts.mean()
    return float((spread**3).mean() / max((spread**2).mean() ** 1.5, SMALLEST_NORM))
