"""Suite `throughput`: the whole workload in one `encode` call, tokenising included, in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.progress import Progress

from benchmarks.agreement import encode_components, fp32_reference, record_agreement
from benchmarks.machine.ceilings import ceiling_of
from benchmarks.machine.reference_speed import Reference, beside_batches
from benchmarks.plan import Plan, Runner, Suite, interleave, loaded, steps
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better, Measurement
from benchmarks.report.statistics import median
from benchmarks.workload import bundle_tokenizer, texts_of_length
from mirror_runtime.bundle import TOKENIZER_FILE
from mirror_runtime.errors import InputError, MirrorError

SUITE = Suite.THROUGHPUT.value

LENGTHS = (8, 16, 32, 64, 128, 256)
"""Tokens, special tokens included: those within the encoder's limit are measured."""

QUICK_LENGTHS = (16, 64, 256)

TEXTS_A_LENGTH = 256
QUICK_TOKENS_A_LENGTH = 2048
"""Two full batches: a pass takes about as long at every length."""

STAGES = ("tokenize", "pack", "infer", "unpack")


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
    counters: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Encode the texts once and keep the time.

        Raises:
            MirrorError: a text or the engine failed.
        """
        encoder = self.runner.encoder
        before = encoder.stats
        began = time.perf_counter()
        encoder.encode(self.texts)
        self.samples_s.append(time.perf_counter() - began)
        after = encoder.stats
        for name in ("tokens", "slots", *(f"{stage}_s" for stage in STAGES)):
            gained = getattr(after, name) - getattr(before, name)
            self.counters[name] = self.counters.get(name, 0) + gained
        if self.reference is not None:
            self.reference_s.append(self.reference())

    def record(self, recorder: Recorder, suite: str, plan: Plan) -> None:
        """Record the rounds so far. Stages overlap and `infer` counts every stream, so shares need not add up to 1."""
        variant, wall = self.runner.variant, sum(self.samples_s)
        tokens = self.counters["tokens"] / len(self.samples_s)
        recorder.add(
            Measurement(
                suite=suite, party=variant.name, metric="texts per second", unit="1/s", better=Better.HIGHER,
                conditions={"computes in": variant.precision.value} if suite == Suite.PEERS.value else {},
                samples=tuple(len(self.texts) / seconds for seconds in self.samples_s),
                reference=tuple(self.reference_s),
            )
        )  # fmt: skip

        def fact(metric: str, *samples: float, unit: str = "") -> None:
            recorder.fact(suite, variant.name, metric, *samples, unit=unit)

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
    with loaded(plan, recorder, Suite.THROUGHPUT) as runners:
        parties = [
            Rounds(
                runner=runner, texts=plan.workload.texts, reference=beside_batches(plan, runner.variant, recorder)
            )
            for runner in runners
        ]  # fmt: skip
        with steps(progress, SUITE, len(parties) * (plan.rounds + 1)) as done:
            _take_turns(
                parties,
                plan.rounds,
                lambda party: party.record(recorder, SUITE, plan),
                lambda name, error: recorder.fail(SUITE, name, error),
                done,
            )
        _by_length(plan, runners, recorder, progress)
        _agreement(plan, runners, recorder)


def _by_length(plan: Plan, runners: Sequence[Runner], recorder: Recorder, progress: Progress) -> None:
    """Measure the rate at exact token lengths; variants take turns within a length."""
    spec = plan.manifest.encoder
    tokenizer = bundle_tokenizer(plan.bundle / TOKENIZER_FILE, spec.max_tokens)
    lengths = [length for length in (QUICK_LENGTHS if plan.quick else LENGTHS) if length <= spec.max_tokens]
    left = list(runners)
    with steps(progress, "throughput by length", len(lengths) * len(runners) * (plan.rounds + 1)) as done:
        for tokens in lengths:
            count = min(TEXTS_A_LENGTH, QUICK_TOKENS_A_LENGTH // tokens) if plan.quick else TEXTS_A_LENGTH
            try:
                texts = texts_of_length(plan.workload.texts, tokenizer, tokens, count=count, seed=plan.seed)
            except InputError as error:
                recorder.fail(SUITE, f"all, {tokens} tokens", error)
                continue

            def keep(party: Rounds, tokens: int = tokens) -> None:
                rates = (len(party.texts) * tokens / seconds for seconds in party.samples_s)
                conditions = {"tokens": tokens, "texts": len(party.texts)}
                name = party.runner.variant.name
                recorder.fact(SUITE, name, "tokens per second", *rates, unit="1/s", conditions=conditions)

            failed = _take_turns(
                [Rounds(runner=runner, texts=texts) for runner in left],
                plan.rounds,
                keep,
                lambda name, error: recorder.fail(SUITE, f"{name}, by length", error),
                done,
            )
            left = [runner for runner in left if runner.variant.name not in failed]


def _agreement(plan: Plan, runners: Sequence[Runner], recorder: Recorder) -> None:
    reference = fp32_reference(plan, "workload", plan.workload.texts, recorder, Suite.THROUGHPUT, runners)
    for runner in runners:
        try:
            vectors = encode_components(plan, runner, plan.workload.texts)
        except MirrorError:
            continue  # its rounds failed, too, and the record has the reason
        record_agreement(recorder, Suite.THROUGHPUT, runner.variant.name, vectors, reference)


def _take_turns(
    parties: Sequence[Rounds],
    rounds: int,
    keep: Callable[[Rounds], None],
    fail: Callable[[str, MirrorError], None],
    done: Callable[[str], None],
) -> set[str]:
    """Warm every party with one whole pass, then interleave their rounds.

    Args:
        parties: to interleave.
        rounds: of each.
        keep: called with a party after each of its rounds.
        fail: called with the name of a party that failed, and the error; it is left out from then on.
        done: called with a party's name after each of its turns.

    Returns:
        The names of those that failed.
    """
    failed: set[str] = set()
    for round_, party in interleave(parties, rounds + 1):
        name = party.runner.variant.name
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
