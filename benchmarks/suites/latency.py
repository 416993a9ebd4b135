"""Suite `latency`: one text at a time, in process, warm, at exact token lengths."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import Progress

from benchmarks.machine.ceilings import floor_of
from benchmarks.machine.reference_speed import beside_one_text
from benchmarks.peers.protocol import time_calls
from benchmarks.plan import Plan, Runner, Suite, interleave, loaded, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better, Measurement
from benchmarks.workload import bundle_tokenizer, texts_of_length
from mirror_runtime.bundle import TOKENIZER_FILE
from mirror_runtime.errors import InputError, MirrorError

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
            recorder.fact(SUITE, runner.variant.name, "streams", runner.encoder.engine.streams)


def _one_length(
    plan: Plan, left: list[Runner], tokens: int, texts: list[str], recorder: Recorder, done: Callable[[str], None]
) -> None:
    """Interleave variants and their reference work; one that fails is removed from `left`."""
    references = {runner.variant.name: beside_one_text(plan, runner.variant, tokens, recorder) for runner in left}
    samples: dict[str, list[float]] = {name: [] for name in references}
    beside: dict[str, list[float]] = {name: [] for name in references}
    for _, runner in interleave(tuple(left), plan.rounds):
        name = runner.variant.name
        if runner in left:
            try:
                samples[name] += time_calls(runner.encoder.encode, texts, calls_a_round(plan))
            except MirrorError as error:
                left.remove(runner)
                recorder.fail(SUITE, name, error)
            else:
                if (reference := references[name]) is not None:
                    beside[name].append(reference())
                recorder.add(
                    Measurement(
                        suite=SUITE, party=name, conditions={"tokens": tokens}, metric="time per text", unit="ms",
                        samples=tuple(samples[name]), reference=tuple(beside[name]), better=Better.LOWER,
                    )
                )  # fmt: skip
        done(f"{name}, {tokens} tokens")
    for runner in left:
        floor = floor_of(runner.variant, tokens, plan, recorder.measurements)
        if floor is not None:
            recorder.fact(SUITE, runner.variant.name, "floor", floor, unit="ms", conditions={"tokens": tokens})


def texts_in_turn(plan: Plan, tokens: int) -> list[str]:
    """Build the texts of exactly `tokens` tokens that calls take in turn.

    Raises:
        InputError: the workload has too few words.
    """
    tokenizer = bundle_tokenizer(plan.bundle / TOKENIZER_FILE, plan.manifest.encoder.max_tokens)
    return texts_of_length(plan.workload.texts, tokenizer, tokens, count=TEXTS_A_LENGTH, seed=plan.seed)
