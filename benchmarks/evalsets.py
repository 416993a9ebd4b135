"""Evaluation sets in every layout that training/evaluate.py reads, through its own reader in a process of its own.

This room measures what ships and imports nothing of training's; two readers of one format would drift apart.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mirror_runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
QUICK_PAIRS = 250

_READ = """
import dataclasses, json, sys
from mirror_runtime.errors import InputError
from evaluation.sets import read_sets
try:
    sets = [one for path in sys.argv[1:] for one in read_sets(path)]
except InputError as error:
    sys.exit(str(error))
keys = ("name", "sha256", "first", "second")
json.dump([{key: getattr(one, key) for key in keys} | {"scores": one.scores.tolist()} for one in sets], sys.stdout)
"""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Scored pairs.

    Attributes:
        name: the file's, without suffix.
        group: "sts" or "words".
        sha256: of the file.
        first: one text of each pair.
        second: the other.
        scores: people's, one a pair; higher is more alike.
    """

    name: str
    group: str
    sha256: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]


def read_evaluation_sets(
    sts: Sequence[Path], words: Sequence[Path], *, quick: bool = False
) -> tuple[EvaluationSet, ...]:
    """Read sets of sentence and of word similarity.

    Args:
        sts: files of sentence pairs.
        words: files of word pairs.
        quick: take the same sample of at most `QUICK_PAIRS` pairs of each; its size is in the set's name.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    sets = [*_read("sts", sts), *_read("words", words)]
    if not sets:
        raise InputError("suite quality needs --sts or --words: scored pairs to judge vectors by")
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise InputError(f"two evaluation sets have one name: {', '.join(sorted(names))}")
    return tuple(_sample(one) if quick and len(one.scores) > QUICK_PAIRS else one for one in sets)


def _sample(one: EvaluationSet) -> EvaluationSet:
    at = sorted(random.Random(0).sample(range(len(one.scores)), QUICK_PAIRS))
    return replace(
        one,
        name=f"{one.name}, {QUICK_PAIRS} pairs",
        first=tuple(one.first[i] for i in at),
        second=tuple(one.second[i] for i in at),
        scores=tuple(one.scores[i] for i in at),
    )


def _read(group: str, paths: Sequence[Path]) -> list[EvaluationSet]:
    if not paths:
        return []
    command = [sys.executable, "-c", _READ, *(str(path.absolute()) for path in paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise InputError((done.stderr.strip().splitlines() or ["evaluation sets cannot be read"])[-1])
    return [
        EvaluationSet(
            name=one["name"],
            group=group,
            sha256=one["sha256"],
            first=tuple(one["first"]),
            second=tuple(one["second"]),
            scores=tuple(one["scores"]),
        )
        for one in json.loads(done.stdout)
    ]
