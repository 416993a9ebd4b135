"""Probes: retrieval tasks made from the user's own texts, without labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.perturb import crop, misspell
from evaluation.statistics import Bootstrap, Result
from evaluation.vectors import Encode, ranks, unit_vectors
from mirror_runtime.errors import InputError

MIN_WORDS = 4
"""Shorter lines have no halves and no cropped form worth looking for."""

MIN_ITEMS = 50
"""Fewer questions say too little: the interval of a mean of 50 reciprocal ranks is up to 28 points wide."""

Record = tuple[str, ...]
"""A line, or the two parts of a document or pair."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Questions whose answers are known: the answer of each is in the same place, among all answers."""

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def _halves(text: str, rng: random.Random) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _alternating(text: str, rng: random.Random) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[::2]), " ".join(words[1::2])


MAKERS: Mapping[str, Callable[[str, random.Random], tuple[str, str]]] = {
    "crop": lambda text, rng: (crop(text, rng), text),
    "typos": lambda text, rng: (misspell(text, rng), text),
    "halves": _halves,
    "alternating": _alternating,
}
"""Question and answer of a line. `halves` finds the second half by the first; `alternating` finds every second word by
the others."""


def build_probes(records: Sequence[Record], *, seed: int = 0) -> list[Probe]:
    """Make every probe that the records allow; repeated answers are left out, as they could not be told apart.

    Lines give the probes of `MAKERS`; records of two parts give `parts`: the second by the first.

    Raises:
        InputError: no probe has `MIN_ITEMS` questions.
    """
    rng = random.Random(seed)
    made: dict[str, list[tuple[str, str]]] = {"parts": [(one[0], one[1]) for one in records if len(one) == 2]}
    lines = [one[-1] for one in records if len(one[-1].split()) >= MIN_WORDS]
    made |= {name: [make(line, rng) for line in lines] for name, make in MAKERS.items()}
    if not lines:  # words and short phrases
        made["typos"] = [(misspell(one[-1], rng), one[-1]) for one in records]
    probes = []
    for name, pairs in made.items():
        distinct = {answer.casefold(): (question, answer) for question, answer in pairs if question != answer}
        if len(distinct) >= MIN_ITEMS:
            questions, answers = zip(*distinct.values(), strict=True)
            probes.append(Probe(name=name, questions=questions, answers=answers))
    if not probes:
        raise InputError(
            f"{len(records):,} texts are too few to measure on: {MIN_ITEMS} are needed, of {MIN_WORDS} words or more"
        )
    return probes


def evaluate_probes(probes: Sequence[Probe], encode: Encode, bootstrap: Bootstrap, name: str = "own") -> list[Result]:
    """Measure each probe's mean reciprocal rank among all its answers, times 100."""
    lists = [texts for probe in probes for texts in (probe.questions, probe.answers)]
    vectors = unit_vectors(encode, *lists)
    results = []
    for i, probe in enumerate(probes):
        found = ranks(vectors[2 * i], vectors[2 * i + 1], np.arange(len(probe.questions)))
        results.append(bootstrap.mean("probe", name, f"{probe.name}, MRR", 1 / found))
    return results
