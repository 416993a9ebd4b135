"""Suite `latency`: one text at a time, in process, warm, at exact token lengths."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import Progress

from benchmarks.machine.ceilings import floor_of, reference_work
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
    """Measure every variant at every length that the encoder's limit allows, interleaved with its reference work."""
    lengths = [length for length in LENGTHS if length <= plan.manifest.encoder.max_tokens]
    with loaded(plan, recorder, Suite.LATENCY) as runners:
        left = {runner.variant.name: runner for runner in runners}
        with steps(progress, SUITE, len(lengths) * len(runners) * plan.rounds) as done:
            for tokens in lengths:
                try:
                    texts = texts_in_turn(plan, tokens)
                except InputError as error:  # too few words: the other suites do not need these texts
                    recorder.fail(SUITE, f"all, {tokens} tokens", error)
                    continue
                parties = {name: _turns(plan, runner, tokens, texts, recorder) for name, runner in left.items()}
                for name in take_turns(parties, plan.rounds, lambda *it: recorder.fail(SUITE, *it), done):
                    del left[name]
                for name, runner in left.items():
                    floor = floor_of(runner.variant, tokens, plan, recorder.measurements)
                    if floor is not None:
                        recorder.record(SUITE, name, "floor", floor, unit="ms", conditions={"tokens": tokens})
        for name, runner in left.items():
            recorder.record(SUITE, name, "streams", runner.encoder.engine.streams)


def _turns(plan: Plan, runner: Runner, tokens: int, texts: list[str], recorder: Recorder) -> Callable[[int], None]:
    reference = reference_work(plan, runner.variant, recorder, tokens)
    samples: list[float] = []
    beside: list[float] = []

    def turn(_round: int) -> None:
        samples.extend(time_calls(runner.encoder.encode, texts, calls_a_round(plan)))
        if reference is not None:
            beside.append(reference())
        recorder.record(
            SUITE, runner.variant.name, "time per text", *samples, unit="ms", better=Better.LOWER,
            conditions={"tokens": tokens}, reference=beside,
        )  # fmt: skip

    return turn


def texts_in_turn(plan: Plan, tokens: int, count: int = TEXTS_A_LENGTH) -> list[str]:
    """Build texts of exactly `tokens` tokens from the workload's words, which calls take in turn.

    Raises:
        InputError: the workload has too few words.
    """
    tokenizer = bundle_tokenizer(plan.bundle / TOKENIZER_FILE, plan.manifest.encoder.max_tokens)
    return texts_of_length(plan.workload.texts, tokenizer, tokens, count=count, seed=plan.seed)
