"""Choices among phrases: a bigram's synonym among given words (Turney), a name's synonym among all names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.sets import check_fields, read_rows
from evaluation.statistics import Bootstrap, Result
from evaluation.vectors import DECIMALS, Encode, ranks, unit_vectors
from mirror_runtime.errors import InputError

TURNEY, SYNONYMS = ("bigram", "answer"), ("name", "synonym")
"""First columns of the two layouts."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Questions, each with candidates of which the first is right; `candidates` None asks for one of all answers."""

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    candidates: tuple[tuple[str, ...], ...] | None  # of each question, wrong ones


def read_choices(path: str) -> Choices | None:
    """Read a file with the header `bigram<TAB>answer<TAB>distractors…`, | between distractors, or `name<TAB>synonym`.

    Returns:
        None if the file has another header: it is then a set of scored pairs.

    Raises:
        InputError: the file cannot be read, or a line has another number of columns.
    """
    file = Path(path)
    (_, header), *rows = table = read_rows(file)
    kind = tuple(field.strip().lower() for field in header[:2])
    if kind not in (TURNEY, SYNONYMS):
        return None
    columns = 3 if kind == TURNEY else 2
    if len(header) < columns:
        raise InputError(f"{file}, line 1: expected {columns} columns with TABs between, none empty")
    check_fields(file, table)
    for number, fields in rows:
        if not all(field.strip() for field in fields[:columns]):
            raise InputError(f"{file}, line {number}: expected {columns} columns with TABs between, none empty")
        if kind == TURNEY and not set(fields[2].split("|")) - set(fields[0].split()):
            raise InputError(f"{file}, line {number}: every distractor is a word of {fields[0].strip()!r} itself")
    texts = [[field.strip() for field in fields] for _, fields in rows]
    if kind == TURNEY:
        wrong = tuple(tuple(fields[2].split("|")) for fields in texts)
        questions, answers = zip(*((fields[0], fields[1]) for fields in texts), strict=True)
        return Choices(name=file.stem, questions=questions, answers=answers, candidates=wrong)
    answers, questions = zip(*((fields[0], fields[1]) for fields in texts), strict=True)
    return Choices(name=file.stem, questions=questions, answers=answers, candidates=None)


def evaluate_choices(one: Choices, encode: Encode, bootstrap: Bootstrap) -> list[Result]:
    """Measure how often the nearest candidate is the answer; among all answers also how often one of the nearest five.

    An answer as near as another candidate is not the nearest. A bigram's own words are nearest to it for most encoders:
    the first accuracy leaves them out of its candidates.
    """
    if one.candidates is None:
        known = {text: i for i, text in enumerate(dict.fromkeys(one.answers))}
        questions, answers = unit_vectors(encode, one.questions, tuple(known))
        found = ranks(questions, answers, np.array([known[text] for text in one.answers]))
        return [bootstrap.mean("phrases", one.name, f"acc@{k}", found <= k) for k in (1, 5)]
    results = []
    for metric, own in (("accuracy", False), ("accuracy, own words too", True)):
        wrong = [
            [text for text in texts if own or text not in question.split()]
            for question, texts in zip(one.questions, one.candidates, strict=True)
        ]
        questions, answers, others = unit_vectors(
            encode, one.questions, one.answers, [t for texts in wrong for t in texts]
        )
        ends = np.cumsum([0, *map(len, wrong)])
        right = [
            (others[ends[i] : ends[i + 1]] @ questions[i]).round(DECIMALS) < (answers[i] @ questions[i]).round(DECIMALS)
            for i in range(len(questions))
        ]
        results.append(bootstrap.mean("phrases", one.name, metric, [every.all() for every in right]))
    return results
