"""Probes: tasks made from the user's own texts, without labels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.perturb import crop, misspell
from evaluation.statistics import Bootstrap, Result
from evaluation.vectors import Encode, pair_cosines, ranks, unit_vectors
from mirror_runtime.errors import InputError

MIN_WORDS = 4
"""Shorter lines have no halves, and too few words to leave one out."""

MIN_ITEMS = 50
"""Fewer questions say too little: the 95 % interval of a share of 50 is up to 28 points wide."""

COMMON_WORDS = 100
"""So many of the most frequent words are not content words."""

RARE = (2, 30)
"""A word that replaces another occurs in so many texts: a word of one text may be a typo."""

BACKGROUND = 50_000
"""Texts in which words are counted, evenly spaced: more would tell no more."""

DECOYS = 3
"""Decoys of a text: with one, chance decides so much that harm passes and good runs fail (docs/log.md, 2026-11-30)."""

CONTENT = "content"
"""The probe of lines: is a text nearer to its content words, or to itself with the rarest word replaced?"""

PARTS = "parts"
"""The probe of documents: the second part by the first."""

PREDICTIVE = (CONTENT, PARTS)
"""The probes that rank encoders as labelled sets do (docs/log.md, 2026-11-30)."""

Record = tuple[str, ...]
"""A line, or the two parts of a document or pair."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Questions with an answer each: to be found among all answers, or to be nearer than a decoy."""

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    decoys: tuple[str, ...] = ()  # the same number for each question, in the order of the questions


def build_probes(records: Sequence[Record], background: Sequence[Record], *, seed: int = 0) -> list[Probe]:
    """Make the probes that the records allow, each with at least `MIN_ITEMS` questions.

    content: is a line nearer to its content words alone, or to itself with its rarest word replaced, in three ways?
    crop, typos: the line by a run of its words, by a misspelt form. halves: the second half by the first.
    parts: of records of two parts, the second by the first.

    Args:
        records: to ask about; of records of two parts, the second counts as the line.
        background: in which the frequency of words is counted, such as the whole corpus.
        seed: of the changed forms.

    Raises:
        InputError: the records allow none.
    """
    rng = random.Random(seed)
    lines = [line for line in dict.fromkeys(one[-1] for one in records) if len(line.split()) >= MIN_WORDS]
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, lines)]
    pairs = {
        "crop": [(crop(line, rng), line) for line in lines],
        "typos": [(misspell(line, rng), line) for line in lines],
        "halves": [(" ".join(first), " ".join(second)) for first, second in halves],
        PARTS: [(one[0], one[1]) for one in records if len(one) == 2],
    }
    probes = [_content(lines, background, rng)]
    for name, made in pairs.items():
        # A repeated answer could not be told from its likes.
        distinct = {answer.casefold(): (question, answer) for question, answer in made if question != answer}
        questions, answers = zip(*distinct.values(), strict=True) if distinct else ((), ())
        probes.append(Probe(name=name, questions=questions, answers=answers))
    probes = [probe for probe in probes if len(probe.questions) >= MIN_ITEMS]
    if not probes:
        raise InputError(
            f"{len(records):,} texts are too few to measure on: {MIN_ITEMS} are needed, of {MIN_WORDS} words or more"
        )
    return probes


def evaluate_probes(probes: Sequence[Probe], encode: Encode, bootstrap: Bootstrap, name: str = "own") -> list[Result]:
    """Measure how often an answer is nearer than its decoy, or its mean reciprocal rank among all; times 100."""
    lists = [texts for probe in probes for texts in (probe.questions, probe.answers, probe.decoys) if texts]
    vectors = iter(unit_vectors(encode, *lists))
    results = []
    for probe in probes:
        questions, answers = next(vectors), next(vectors)
        if probe.decoys:
            decoys = next(vectors).reshape(len(questions), -1, questions.shape[1])
            near = pair_cosines(questions[:, None], answers[:, None])
            far = pair_cosines(questions[:, None], decoys)
            results.append(bootstrap.mean("probe", name, f"{probe.name}, accuracy", (near > far).mean(axis=1)))
        else:
            found = ranks(questions, answers, np.arange(len(questions)))
            results.append(bootstrap.mean("probe", name, f"{probe.name}, MRR", 1 / found))
    return results


def _content(lines: Sequence[str], background: Sequence[Record], rng: random.Random) -> Probe:
    step = -(-len(background) // BACKGROUND) or 1
    # Not a set: words of one count stand in the order of their first text, in every process.
    counts = Counter(word for one in background[::step] for word in dict.fromkeys(one[-1].lower().split()))
    common = {word for word, _ in counts.most_common(COMMON_WORDS)}
    rare = sorted(word for word, count in counts.items() if RARE[0] <= count <= RARE[1])
    questions, answers, decoys = [], [], []
    for line in lines if len(rare) > DECOYS else ():
        words = line.split()
        content = [word for word in words if word.lower() not in common]
        rarest = min(words, key=lambda word: (len(word) < 3, counts[word.lower()]))
        others = [word for word in rng.sample(rare, DECOYS + 1) if word != rarest.lower()][:DECOYS]
        if 0 < len(content) < len(words):
            at = words.index(rarest)
            questions.append(line)
            answers.append(" ".join(content))
            decoys += [" ".join([*words[:at], other, *words[at + 1 :]]) for other in others]
    return Probe(name=CONTENT, questions=tuple(questions), answers=tuple(answers), decoys=tuple(decoys))
