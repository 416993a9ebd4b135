"""The gate: texts held out from tuning, probes on them before and after, and a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from encoders.reference import Reference
from evaluation.held_out import text_hash
from evaluation.probes import CONTENT, MIN_ITEMS, MIN_WORDS, PARTS, Probe, Record, build_probes, evaluate_probes
from evaluation.similarity import score_pairs
from evaluation.statistics import Bootstrap, Estimate, Result, Verdict, flat, gains
from evaluation.vectors import Encode
from mirror_runtime.errors import InputError
from training.augment import Document, Scored, texts_of
from training.corpus import Corpus, digest
from training.hardware import Hardware
from training.own import FEWEST, choose

MIN_TEXTS = 5 * FEWEST
"""Smaller corpora would lose too many of their texts."""

TOLERANCE = 1.0
"""Points that the probe may lose: good runs of an encoder trained on pairs lose about one (docs/log.md, 2026-11-30)."""

UNMEASURED = "pass --probe none, with a recipe other than auto, to tune unmeasured"

SPEARMAN = "spearman"
"""The probe of scored pairs: the rank correlation of cosine and score."""

CLAIMS: Mapping[str, str] = {
    CONTENT: "of {items} texts that tuning never saw, {before} % were nearer to their content words than to themselves "
    "with the rarest word replaced; now {after} %",
    PARTS: "of {items} documents that tuning never saw, the text was found by the title with a mean reciprocal rank of "
    "{before} (of 100); now {after}",
    SPEARMAN: "on {items} scored pairs that tuning never saw, Spearman of cosine and score was {before}; now {after}",
}
"""What each probe of the gate shows, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A probe on held-out texts, before and after tuning; all figures are times 100."""

    probe: str = CONTENT
    texts: int  # that were held out
    held_out: tuple[str, ...] = ()  # their hashes
    items: int  # of them, those that the probe asks about
    before: Estimate
    after: Estimate
    gain: Estimate  # with its paired interval
    seconds: float  # that the gate took

    @property
    def verdict(self) -> Verdict:
        """What tuning did to the probe; worse is more than `TOLERANCE` below zero."""
        return Verdict.of(self.gain, TOLERANCE)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "held_out": self.texts,
            "probe": self.probe,
            "items": self.items,
            **flat("before", self.before),
            **flat("after", self.after),
            **flat("gain", self.gain),
            "verdict": self.verdict.value,
            "sec": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        claim = CLAIMS[self.probe].format(
            items=self.items, before=f"{self.before.value:.1f}", after=f"{self.after.value:.1f}"
        )
        return f"{self.verdict.value}: {claim}, {self.gain:+}"


class Gate:
    """Measures a model before and after it is tuned.

    Args:
        held_out: what the probe asks about.
        background: the texts that are tuned on, in which words are counted.
        only_content: measure `content`, whatever the texts are.
        hardware: of the run. Texts are encoded on the CPU, in bf16 where the run tunes in it on the CPU, else in fp32.

    Raises:
        InputError: the texts are too short or too alike for the probe.
    """

    def __init__(
        self,
        held_out: Sequence[Record | Scored],
        background: Sequence[Record],
        hardware: Hardware,
        *,
        only_content: bool = False,
    ) -> None:
        begin = time.perf_counter()
        self._texts = len(held_out)
        self._hashes = tuple(sorted({text_hash(texts_of(one)[-1]) for one in held_out}))
        scored = [one for one in held_out if isinstance(one, Scored) and not only_content]
        self._pairs = _independent(scored)
        documents = isinstance(held_out[0], Document) and not only_content
        self._probe = SPEARMAN if self._pairs else PARTS if documents else CONTENT
        records = [texts_of(one) for one in held_out]
        self._probes = [] if self._pairs else _probes(self._probe, records, background)
        self._hardware = hardware
        self._seconds = time.perf_counter() - begin

    def before(self, reference: Reference) -> None:
        """Measure the base."""
        self._before = self._measure(reference)

    def after(self, reference: Reference) -> Outcome:
        """Measure the tuned model and compare."""
        after = self._measure(reference)
        (gain,) = gains(self._before, after)
        return Outcome(
            probe=self._probe,
            texts=self._texts,
            held_out=self._hashes,
            items=after[0].samples,
            before=self._before[0].figure,
            after=after[0].figure,
            gain=gain,
            seconds=self._seconds,
        )

    def _measure(self, reference: Reference) -> list[Result]:
        begin = time.perf_counter()
        with self._hardware.autocast():
            if self._pairs:
                results = [_spearman(self._pairs, reference.encode_unnormalized, Bootstrap())]
            else:
                results = evaluate_probes(self._probes, reference.encode_unnormalized, Bootstrap())
        self._seconds += time.perf_counter() - begin
        return results


def _probes(name: str, held_out: Sequence[Record], background: Sequence[Record]) -> list[Probe]:
    probes: list[Probe] = []
    with contextlib.suppress(InputError):  # it has no probe at all
        probes = [one for one in build_probes(held_out, background) if one.name == name]
    if not probes and name == PARTS:
        raise InputError(
            f"fewer than {MIN_ITEMS} of {len(held_out)} held-out documents have a text that no other one has, which "
            f"the probe needs: {UNMEASURED}"
        )
    if not probes:
        raise InputError(
            f"fewer than {MIN_ITEMS} of {len(held_out)} held-out texts have {MIN_WORDS} words or more, both "
            f"rare and common ones, which the probe needs: {UNMEASURED}"
        )
    return probes


def _independent(pairs: Sequence[Scored]) -> list[Scored]:
    """Return the pairs, whatever their order, of which no two share a text: the bootstrap takes them as independent.

    Raises:
        InputError: so few are left that they say little.
    """
    seen: set[str] = set()
    found = []
    for pair in sorted(pairs):
        if seen.isdisjoint(pair[:2]):
            found.append(pair)
            seen.update(pair[:2])
    if pairs and len(found) < MIN_ITEMS:
        raise InputError(
            f"of {len(pairs)} held-out pairs only {len(found)} share no text, and {MIN_ITEMS} are needed: {UNMEASURED}"
        )
    return found


def _spearman(pairs: Sequence[Scored], encode: Encode, bootstrap: Bootstrap) -> Result:
    first, second, scores = zip(*pairs, strict=True)
    try:
        return score_pairs(first, second, scores, encode, bootstrap, ("probe", "own", SPEARMAN))
    except InputError as error:
        raise InputError(f"{error}: {UNMEASURED}") from error


def split_corpus(corpus: Corpus, halves: int = 1) -> tuple[Corpus, list[list[Record | Scored]]]:
    """Take the texts to be held out from a corpus: records without hard negatives, documents, or scored pairs.

    `halves` is 2 where recipes are chosen by one half and the chosen one is measured on the other: twice as many texts
    in two lists. A (last) text is in one of them, whatever its titles and the order of the corpus.

    Raises:
        InputError: the corpus is too small.
    """
    texts = len({record[-1] for record in corpus.records})
    if texts < halves * MIN_TEXTS:
        raise InputError(
            f"{texts:,} distinct texts are too few to hold some out and measure whether tuning helps: pass "
            f"{halves * MIN_TEXTS} or more, or {UNMEASURED.removeprefix('pass ')}"
        )
    chosen = choose(corpus.records, halves)
    rest = tuple(example for example in corpus.examples if not chosen.keys() & texts_of(example))
    held: list[list[Record | Scored]] = [[] for _ in range(halves)]
    for example in corpus.examples:
        record = texts_of(example)[:2]
        if record[-1] in chosen:
            held[chosen[record[-1]]].append(example if isinstance(example, (Document, Scored)) else record)
    return dataclasses.replace(corpus, examples=rest, sha256=digest(rest)), held
