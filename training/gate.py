"""The gate: texts held out from tuning, probes on them before and after, and a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from encoders.reference import Reference
from evaluation.probes import MIN_ITEMS, Probe, Record, build_probes, evaluate_probes
from evaluation.statistics import Bootstrap, Estimate, Result, estimate, flat
from mirror_runtime.errors import InputError
from training.corpus import Corpus, digest
from training.formats import Records
from training.hardware import Hardware

SHARE = 0.05
FEWEST, MOST = 2 * MIN_ITEMS, 400
"""Share of the distinct texts that is held out, and its limits: more would cost time and tell little more."""

MIN_TEXTS = 5 * FEWEST
"""Smaller corpora would lose too many of their texts."""

PREDICTIVE = ("parts", "halves", "alternating")
"""Probes that rank encoders as labelled sets do (docs/log.md, 2026-11-30)."""

DOCUMENT = ("title", "text")
"""Fields of a document with parts, in JSON lines."""


class ProbeChoice(str, Enum):
    """What a run is measured by without labels."""

    AUTO = "auto"
    """Texts are held out, and the probes of `choose_probes` are measured on them."""
    NONE = "none"
    """Nothing is held out or measured."""


class Verdict(str, Enum):
    """What tuning did to the probe."""

    BETTER = "better"
    """The whole interval of the difference is above zero."""
    UNCLEAR = "no clear change"
    WORSE = "worse"
    """The whole interval is below zero."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The probe on held-out texts, before and after tuning; all figures are times 100."""

    texts: int  # that were held out
    probes: tuple[str, ...]  # whose mean reciprocal ranks are averaged
    before: Estimate
    after: Estimate
    gain: Estimate  # with its paired interval
    seconds: float  # that the gate took

    @property
    def verdict(self) -> Verdict:
        """Better or worse only if the interval of the gain leaves out zero."""
        if self.gain.high < 0:
            return Verdict.WORSE
        return Verdict.BETTER if self.gain.low > 0 else Verdict.UNCLEAR

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "held_out": self.texts,
            "probes": list(self.probes),
            **flat("before", self.before),
            **flat("after", self.after),
            **flat("gain", self.gain),
            "verdict": self.verdict.value,
            "sec": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        return (
            f"{self.verdict.value}: on {self.texts} texts that tuning never saw, the probe ({', '.join(self.probes)}; "
            f"mean reciprocal rank × 100) went from {self.before.value:.2f} to {self.after.value:.2f}, {self.gain:+}"
        )


class Gate:
    """Measures a model before and after it is tuned."""

    def __init__(self, held_out: Sequence[Record], hardware: Hardware) -> None:
        begin = time.perf_counter()
        self._texts = len(held_out)
        self._probes = choose_probes(build_probes(held_out))
        self._hardware = hardware
        self._before: list[Result] = []
        self._seconds = time.perf_counter() - begin

    def before(self, reference: Reference) -> None:
        """Measure the base."""
        self._before = self._measure(reference)

    def after(self, reference: Reference) -> Outcome:
        """Measure the tuned model and compare."""
        after = self._measure(reference)
        before = self._before
        drawn = [np.mean([one.resampled for one in results], axis=0) for results in (before, after)]
        values = [float(np.mean([one.figure.value for one in results])) for results in (before, after)]
        return Outcome(
            texts=self._texts,
            probes=tuple(probe.name for probe in self._probes),
            before=estimate(values[0], drawn[0]),
            after=estimate(values[1], drawn[1]),
            gain=estimate(values[1] - values[0], drawn[1] - drawn[0]),
            seconds=self._seconds,
        )

    def _measure(self, reference: Reference) -> list[Result]:
        begin = time.perf_counter()
        with self._hardware.autocast():
            results = evaluate_probes(self._probes, reference.encode_unnormalized, Bootstrap())
        self._seconds += time.perf_counter() - begin
        return results


def choose_probes(probes: Sequence[Probe]) -> list[Probe]:
    """Keep the probes of `PREDICTIVE`; all of them if none is there, as for single words."""
    return [probe for probe in probes if probe.name in PREDICTIVE] or list(probes)


def split_corpus(corpus: Corpus) -> tuple[Corpus, list[Record]]:
    """Take the texts to be held out from a corpus.

    Raises:
        InputError: the corpus is too small.
    """
    records: list[Record] = [(one,) if isinstance(one, str) else one for one in corpus.examples]
    if len(records) < MIN_TEXTS:
        raise InputError(
            f"{len(records):,} distinct texts are too few to hold some out and measure whether tuning helps: pass "
            f"{MIN_TEXTS} or more, or --probe none to tune unmeasured"
        )
    held, rest = hold_out(records)
    examples = tuple(one[0] if isinstance(corpus.examples[0], str) else (one[0], one[1]) for one in rest)
    return dataclasses.replace(corpus, examples=examples, sha256=digest(rest)), held


def hold_out(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Split records into those held out and the rest, each in its order.

    The held-out ones have the smallest hashes of their (last) text: the same texts give the same split in any order
    and with any seed, with titles or without.
    """
    keys = [hashlib.blake2b(record[-1].encode(), digest_size=8).digest() for record in records]
    count = min(MOST, max(FEWEST, round(SHARE * len(records))))
    chosen = set(sorted(range(len(records)), key=keys.__getitem__)[:count])
    parts: tuple[list[Record], list[Record]] = ([], [])
    for i, record in enumerate(records):
        parts[i not in chosen].append(record)
    return parts


def read_own(path: str) -> list[Record]:
    """Read a user's distinct texts: lines, or documents of JSON lines with the fields title and text.

    Raises:
        InputError: the file cannot be read.
    """
    source, documents = Records(path), Records(path, pairs=True, columns=DOCUMENT)
    if documents.has_columns:
        with contextlib.suppress(InputError):  # it has no title
            next(iter(documents), None)
            source = documents
    return list(dict.fromkeys(record for record in source if all(record)))
