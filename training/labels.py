"""Labelled records: scored pairs, texts with hard negatives, and entailment, from the fields of a corpus file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import chain

from mirror_runtime.errors import InputError
from training.augment import Example, Scored

Record = tuple[str, ...]


class Labels(str, Enum):
    """Kinds of labels. A file of each has named columns."""

    SCORES = "scores"
    """A number and two texts, more similar with a higher number."""
    TRIPLETS = "triplets"
    """A text, one with the same meaning, and one or more that differ in meaning (hard negatives)."""
    ENTAILMENT = "entailment"
    """A label, a premise and a hypothesis. A premise and what it entails become a pair, with what contradicts the
    premise, in any file, as hard negatives (supervised SimCSE, section 4); neutral hypotheses are left out."""


COLUMNS: Mapping[Labels, tuple[str, ...]] = {
    Labels.SCORES: ("score", "sentence1", "sentence2"),
    Labels.TRIPLETS: ("anchor", "positive", "negative"),
    Labels.ENTAILMENT: ("label", "sentence1", "sentence2"),
}

ENTAILS, NEUTRAL, CONTRADICTS = ("entailment", "0"), ("neutral", "1"), ("contradiction", "2")
"""Names of the labels, and their numbers in SNLI."""

UNLABELLED = ("-", "-1")
"""On which SNLI's annotators did not agree."""


def labelled(
    labels: Labels | None, rows: Iterable[Record], name: str, contradicted: Mapping[str, Sequence[str]]
) -> Iterator[Record]:
    """Check the rows of a corpus file, called `name`, and turn them into records; `contradicted`: `contradictions`.

    Yields:
        The texts of an example, then its score if it has one. An empty or unlabelled row gives empty texts.

    Raises:
        InputError: a score is not a number, a label is unknown, or a text is missing; the message names the row.
    """
    if labels is Labels.ENTAILMENT:
        return _entailment(rows, name, contradicted)
    return iter(rows) if labels is None else _READERS[labels](rows, name)


def contradictions(files: Iterable[Iterable[Record]]) -> dict[str, list[str]]:
    """Return what contradicts each premise in the rows of entailment files."""
    found: dict[str, list[str]] = {}
    for label, premise, hypothesis in chain.from_iterable(files):
        if label.lower() in CONTRADICTS and hypothesis:
            found.setdefault(premise, []).append(hypothesis)
    return found


def example_of(labels: Labels | None, record: Record) -> Example:
    """Turn a record of `labelled` into an example."""
    if labels is Labels.SCORES:
        return Scored(record[0], record[1], float(record[2]))
    return record if len(record) > 1 else record[0]


def _scored(rows: Iterable[Record], name: str) -> Iterator[Record]:
    for number, (score, first, second) in enumerate(rows, 1):
        try:
            value = float(score) if first or second else 0.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"corpus {name}, row {number}: the score must be a number, and is {score[:60]!r}")
        yield first, second, repr(value) if first or second else ""


def _triplets(rows: Iterable[Record], name: str) -> Iterator[Record]:
    for number, (anchor, positive, *negatives) in enumerate(rows, 1):
        found = [text for text in negatives if text]
        if (anchor or positive) and not found:
            raise InputError(f"corpus {name}, row {number}: no negative: use --pairs for texts without any")
        yield anchor, positive, *(found or [""])


def _entailment(rows: Iterable[Record], name: str, contradicted: Mapping[str, Sequence[str]]) -> Iterator[Record]:
    for number, (label, premise, hypothesis) in enumerate(rows, 1):
        if not (premise or hypothesis):
            continue
        if not (premise and hypothesis):
            raise InputError(f"corpus {name}, row {number}: one text of the pair is empty")
        if label.lower() in ENTAILS:
            yield premise, hypothesis, *contradicted.get(premise, [])
        elif label in UNLABELLED:
            yield "", ""
        elif label.lower() not in (*NEUTRAL, *CONTRADICTS):
            raise InputError(
                f"corpus {name}, row {number}: the label {label[:60]!r} is unknown: it must be entailment, neutral or "
                "contradiction, or 0, 1 or 2"
            )


_READERS: Mapping[Labels, Callable[[Iterable[Record], str], Iterator[Record]]] = {
    Labels.SCORES: _scored,
    Labels.TRIPLETS: _triplets,
}
