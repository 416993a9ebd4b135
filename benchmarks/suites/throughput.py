"""Suite `throughput`: the whole workload in one `encode` call, tokenising included, in interleaved rounds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from rich.progress import Progress

from benchmarks.agreement import encode_components, fp32_reference, record_agreement
from benchmarks.machine.ceilings import Reference, ceiling_of, reference_work
from benchmarks.plan import Plan, Runner, Suite, loaded, steps, take_turns
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from benchmarks.report.statistics import median
from benchmarks.suites.latency import texts_in_turn
from mirror_runtime.errors import InputError, MirrorError

SUITE = Suite.THROUGHPUT.value

LENGTHS = (8, 16, 32, 64, 128, 256)
"""Tokens, special tokens included: those within the encoder's limit are measured."""

QUICK_LENGTHS = (16, 64, 256)

TEXTS_A_LENGTH = 256
QUICK_TOKENS_A_LENGTH = 2048
"""Two full batches: a pass takes about as long at every length."""

STAGES = ("tokenize", "pack", "infer", "unpack")
COUNTERS = ("tokens", "slots", *(f"{stage}_s" for stage in STAGES))


@dataclass(kw_only=True)
class Rounds:
    """The rounds of one variant: seconds of each, and what the encoder's counters gained over all of them.

    Attributes:
        reference: work that is timed after each round, if any.
    """

    runner: Runner
    texts: Sequence[str]
    reference: Reference | None = None
    samples_s: list[float] = field(default_factory=list)
    reference_s: list[float] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        """Encode the texts once and keep the time."""
        encoder = self.runner.encoder
        before = encoder.stats
        began = time.perf_counter()
        encoder.encode(self.texts)
        self.samples_s.append(time.perf_counter() - began)
        after = encoder.stats
        self.counters.update({name: getattr(after, name) - getattr(before, name) for name in COUNTERS})
        if self.reference is not None:
            self.reference_s.append(self.reference())

    def record(self, recorder: Recorder, suite: str, plan: Plan) -> None:
        """Record the rounds so far. Stages overlap and `infer` counts every stream, so shares need not add up to 1."""
        variant, wall = self.runner.variant, sum(self.samples_s)
        tokens = self.counters["tokens"] / len(self.samples_s)
        fact = partial(recorder.record, suite, variant.name)
        fact(
            "texts per second", *(len(self.texts) / seconds for seconds in self.samples_s), unit="1/s",
            better=Better.HIGHER, reference=self.reference_s,
            conditions={"computes in": variant.precision.value} if suite == Suite.PEERS.value else {},
        )  # fmt: skip
        fact("tokens per second", *(tokens / seconds for seconds in self.samples_s), unit="1/s")
        fact("row fill", self.counters["tokens"] / self.counters["slots"])
        fact("streams", self.runner.encoder.engine.streams)
        for stage in STAGES:
            fact(f"{stage} share", self.counters[f"{stage}_s"] / wall)
        ceiling = ceiling_of(variant, recorder.measurements)
        if ceiling is not None and plan.shape is not None:
            flop_per_s = tokens / median(self.samples_s) * plan.shape.flop_per_token
            fact("share of ceiling", flop_per_s / (ceiling * 1e9))


def run_throughput(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Measure the whole workload, then texts of exact lengths, then the vectors' agreement with fp32."""
    texts, limit = plan.workload.texts, plan.manifest.encoder.max_tokens
    lengths = [None, *(length for length in (QUICK_LENGTHS if plan.quick else LENGTHS) if length <= limit)]
    with loaded(plan, recorder, Suite.THROUGHPUT) as runners:
        left: Sequence[Runner] = runners
        with steps(progress, SUITE, len(lengths) * len(runners) * (plan.rounds + 1)) as done:
            for tokens in lengths:
                left = _measure(plan, left, tokens, recorder, done)
        reference = fp32_reference(plan, "workload", texts, recorder, Suite.THROUGHPUT, runners)
        for runner in runners:
            with suppress(MirrorError):  # its rounds failed, too, and the record has the reason
                vectors = encode_components(plan, runner, texts)
                record_agreement(recorder, Suite.THROUGHPUT, runner.variant.name, vectors, reference)


def _measure(
    plan: Plan, runners: Sequence[Runner], tokens: int | None, recorder: Recorder, done: Callable[[str], None]
) -> Sequence[Runner]:
    """Warm every variant with one whole pass, then interleave their rounds over texts of a length (None: the workload).

    Returns:
        The variants that did not fail.
    """
    what = "" if tokens is None else f", {tokens} tokens"
    texts: Sequence[str] = plan.workload.texts
    if tokens is not None:
        count = min(TEXTS_A_LENGTH, QUICK_TOKENS_A_LENGTH // tokens) if plan.quick else TEXTS_A_LENGTH
        try:
            texts = texts_in_turn(plan, tokens, count)
        except InputError as error:
            recorder.fail(SUITE, f"all{what}", error)
            return runners

    def turn(party: Rounds, round_: int) -> None:
        if round_ == 0:
            party.runner.encoder.encode(texts)
            return
        party.run()
        if tokens is None:
            party.record(recorder, SUITE, plan)
        else:
            rates = (len(texts) * tokens / seconds for seconds in party.samples_s)
            name, conditions = party.runner.variant.name, {"tokens": tokens, "texts": len(texts)}
            recorder.record(SUITE, name, "tokens per second", *rates, unit="1/s", conditions=conditions)

    turns = {}
    for runner in runners:
        reference = reference_work(plan, runner.variant, recorder) if tokens is None else None
        turns[runner.variant.name] = partial(turn, Rounds(runner=runner, texts=texts, reference=reference))
    failed = take_turns(turns, plan.rounds + 1, lambda name, error: recorder.fail(SUITE, name + what, error), done)
    return [runner for runner in runners if runner.variant.name not in failed]
