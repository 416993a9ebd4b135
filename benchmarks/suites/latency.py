"""Suite `latency`: one text at a time, in process, warm, at exact token lengths."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import Progress

from benchmarks.machine.ceilings import floor_of
from benchmarks.machine.reference_speed import beside_one_text
from benchmarks.peers.protocol import time_calls
from benchmarks.plan import Plan, Runner, Suite, loaded, steps, take_turns
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from benchmarks.workload import bundle_tokenizer, texts_of_length
from mirror_runtime.bundle import TOKENIZER_FILE
from mirror_runtime.errors import InputError

SUITE = Suite.LATENCY.value

LENGTHS = (8, 16, 32, 64, 128)
"""Tokens, special tokens included: those within the encoder's limit are measured."""

TEXTS_A_LENGTH = 16
"""Different texts in turn, so that no call repeats the one before."""

FULL_SAMPLES = 2000
QUICK_SAMPLES = 60


def calls_a_round(plan: Plan) -> int:
    """Return the calls of one text that a party makes in a round."""
    return -(-(QUICK_SAMPLES if plan.quick else FULL_SAMPLES) // plan.rounds)


def run_latency(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Measure every variant at every length that the encoder's limit allows."""
    lengths = [length for length in LENGTHS if length <= plan.manifest.encoder.max_tokens]
    with loaded(plan, recorder, Suite.LATENCY) as runners:
        left = list(runners)
        with steps(progress, SUITE, len(lengths) * len(runners) * plan.rounds) as done:
            for tokens in lengths:
                try:
                    texts = texts_in_turn(plan, tokens)
                except InputError as error:  # too few words: the other suites do not need these texts
                    recorder.fail(SUITE, f"all, {tokens} tokens", error)
                else:
                    _one_length(plan, left, tokens, texts, recorder, done)
        for runner in left:
            recorder.record(SUITE, runner.variant.name, "streams", runner.encoder.engine.streams)


def _one_length(
    plan: Plan, left: list[Runner], tokens: int, texts: list[str], recorder: Recorder, done: Callable[[str], None]
) -> None:
    """Interleave variants and their reference work; one that fails is removed from `left`."""
    conditions = {"tokens": tokens}

    def turns(runner: Runner) -> Callable[[int], None]:
        reference = beside_one_text(plan, runner.variant, tokens, recorder)
        samples: list[float] = []
        beside: list[float] = []

        def turn(_round: int) -> None:
            samples.extend(time_calls(runner.encoder.encode, texts, calls_a_round(plan)))
            if reference is not None:
                beside.append(reference())
            recorder.record(
                SUITE, runner.variant.name, "time per text", *samples, unit="ms", better=Better.LOWER,
                conditions=conditions, reference=beside,
            )  # fmt: skip

        return turn

    parties = {runner.variant.name: turns(runner) for runner in left}
    failed = take_turns(
        parties, plan.rounds, lambda name, error: recorder.fail(SUITE, name, error),
        lambda name: done(f"{name}, {tokens} tokens"),
    )  # fmt: skip
    left[:] = [runner for runner in left if runner.variant.name not in failed]
    for runner in left:
        floor = floor_of(runner.variant, tokens, plan, recorder.measurements)
        if floor is not None:
            recorder.record(SUITE, runner.variant.name, "floor", floor, unit="ms", conditions=conditions)


def texts_in_turn(plan: Plan, tokens: int, count: int = TEXTS_A_LENGTH) -> list[str]:
    """Build texts of exactly `tokens` tokens from the workload's words, which calls take in turn.

    Raises:
        InputError: the workload has too few words.
    """
    tokenizer = bundle_tokenizer(plan.bundle / TOKENIZER_FILE, plan.manifest.encoder.max_tokens)
    return texts_of_length(plan.workload.texts, tokenizer, tokens, count=count, seed=plan.seed)
