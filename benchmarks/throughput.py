"""Suite `throughput`: the whole workload in one `encode` call, tokenising included, in rounds that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.progress import Progress

from benchmarks.ceilings import EncoderShape
from benchmarks.machine_results import Ceiling
from benchmarks.results import LengthResult, ThroughputResult
from benchmarks.session import Plan, Results, Runner, steps
from benchmarks.summary import interleave, median
from benchmarks.workload import bundle_tokenizer, texts_of_length
from benchmarks.yardstick import Yardstick, beside_batches
from mirror_runtime.bundle import TOKENIZER_FILE
from mirror_runtime.errors import MirrorError

LENGTHS = (8, 16, 32, 64, 128, 256)
"""Tokens, special tokens included: those that the encoder's limit allows are measured."""

QUICK_LENGTHS = (16, 64, 256)

TEXTS_A_LENGTH = 256
QUICK_TOKENS_A_LENGTH = 2048
"""Two full batches: a pass takes about as long at every length."""


@dataclass(kw_only=True)
class Rounds:
    """The rounds of one runner: seconds of each, and what the encoder's counters gained over all of them.

    Attributes:
        yardstick: measured after each round, if there is one.
    """

    runner: Runner
    texts: Sequence[str]
    yardstick: Yardstick | None = None
    samples_s: list[float] = field(default_factory=list)
    yardstick_s: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Encode the workload once and keep its time.

        Raises:
            MirrorError: a text or the engine failed.
        """
        encoder = self.runner.encoder
        before = encoder.stats
        began = time.perf_counter()
        encoder.encode(self.texts)
        self.samples_s.append(time.perf_counter() - began)
        after = encoder.stats
        for name in ("tokens", "slots", "tokenize_s", "pack_s", "infer_s", "unpack_s"):
            gained = getattr(after, name) - getattr(before, name)
            self.counters[name] = self.counters.get(name, 0) + gained
        if self.yardstick is not None:
            self.yardstick_s.append(self.yardstick())

    def result(self, flop_per_token: int | None, ceiling: Ceiling | None) -> ThroughputResult:
        """Sum up the rounds so far."""
        typical, wall = median(self.samples_s), sum(self.samples_s)
        tokens = round(self.counters["tokens"] / len(self.samples_s))
        share = None
        if flop_per_token is not None and ceiling is not None:
            share = tokens / typical * flop_per_token / (ceiling.gflop_per_s * 1e9)
        return ThroughputResult(
            point=self.runner.point,
            streams=self.runner.encoder.engine.streams,
            texts=len(self.texts),
            tokens=tokens,
            samples_s=tuple(self.samples_s),
            texts_per_s=len(self.texts) / typical,
            texts_per_s_min=len(self.texts) / max(self.samples_s),
            texts_per_s_max=len(self.texts) / min(self.samples_s),
            tokens_per_s=tokens / typical,
            row_fill=self.counters["tokens"] / self.counters["slots"],
            ceiling_share=share,
            tokenize_share=self.counters["tokenize_s"] / wall,
            pack_share=self.counters["pack_s"] / wall,
            infer_share=self.counters["infer_s"] / wall,
            unpack_share=self.counters["unpack_s"] / wall,
            yardstick_s=tuple(self.yardstick_s),
        )


def run_throughput(
    plan: Plan, runners: Sequence[Runner], shape: EncoderShape | None, results: Results, progress: Progress
) -> None:
    """Warm every runner with one whole pass, then let them take turns."""
    if results.has("throughput"):
        return  # rounds take turns within one run: half of them from another day would not
    parties = [
        Rounds(runner=runner, texts=plan.workload.texts, yardstick=beside_batches(runner.point, shape, results))
        for runner in runners
    ]

    def keep(party: Rounds) -> None:
        point = party.runner.point
        ceiling = results.ceilings.get((point.engine, point.precision))
        results.throughput[point.name] = party.result(plan.flop_per_token, ceiling)

    with steps(progress, "throughput", len(parties) * (plan.rounds + 1)) as done:
        _take_turns(parties, plan.rounds, keep, lambda name, error: results.fail("throughput", name, error), done)
    results.finish("throughput")


def run_lengths(plan: Plan, runners: Sequence[Runner], results: Results, progress: Progress) -> None:
    """Measure the rate at exact token lengths; runners take turns within a length.

    Raises:
        InputError: the workload has too few words for texts of exact lengths.
    """
    if results.has("lengths"):
        return
    spec = plan.manifest.encoder
    tokenizer = bundle_tokenizer(plan.bundle / TOKENIZER_FILE, spec.max_tokens)
    lengths = [length for length in (QUICK_LENGTHS if plan.quick else LENGTHS) if length <= spec.max_tokens]
    left = list(runners)

    def fail(name: str, error: MirrorError) -> None:
        results.fail("throughput", f"{name}, by length", error)

    with steps(progress, "throughput by length", len(lengths) * len(runners) * (plan.rounds + 1)) as done:
        for length in lengths:
            count = min(TEXTS_A_LENGTH, QUICK_TOKENS_A_LENGTH // length) if plan.quick else TEXTS_A_LENGTH
            texts = texts_of_length(plan.workload.texts, tokenizer, length, count=count, seed=plan.seed)

            def keep(party: Rounds, length: int = length) -> None:
                results.lengths[party.runner.point.name, length] = _length_result(party, length)

            parties = [Rounds(runner=runner, texts=texts) for runner in left]
            failed = _take_turns(parties, plan.rounds, keep, fail, done)
            left = [runner for runner in left if runner.point.name not in failed]
    results.finish("lengths")


def _take_turns(
    parties: Sequence[Rounds],
    rounds: int,
    keep: Callable[[Rounds], None],
    fail: Callable[[str, MirrorError], None],
    done: Callable[[str], None],
) -> set[str]:
    """Warm every party with one whole pass, then let them take turns.

    Args:
        parties: who takes turns.
        rounds: how often.
        keep: called with a party after each of its rounds.
        fail: called with the name of a party that failed, and how; it is left out from then on.
        done: called with a party's name after each of its turns.

    Returns:
        The names of those that failed.
    """
    failed: set[str] = set()
    for round_, party in interleave(parties, rounds + 1):
        name = party.runner.point.name
        if name not in failed:
            try:
                if round_ == 0:
                    party.runner.encoder.encode(party.texts)
                else:
                    party.run()
                    keep(party)
            except MirrorError as error:
                failed.add(name)
                fail(name, error)
        done(name)
    return failed


def _length_result(party: Rounds, tokens: int) -> LengthResult:
    rate = len(party.texts) / median(party.samples_s)
    return LengthResult(
        point=party.runner.point,
        tokens=tokens,
        texts=len(party.texts),
        samples_s=tuple(party.samples_s),
        texts_per_s=rate,
        tokens_per_s=rate * tokens,
    )
