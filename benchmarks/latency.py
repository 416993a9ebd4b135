"""Suite `latency`: one text at a time, in process, warm, at exact token lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.progress import Progress

from benchmarks.bandwidth import floor_ms
from benchmarks.ceilings import EncoderShape
from benchmarks.peers.protocol import time_calls
from benchmarks.results import LatencyResult
from benchmarks.session import Plan, Results, Runner, steps
from benchmarks.summary import interleave, percentile
from benchmarks.workload import bundle_tokenizer, texts_of_length
from benchmarks.yardstick import beside_one_text
from mirror_runtime.bundle import TOKENIZER_FILE
from mirror_runtime.errors import MirrorError

LENGTHS = (8, 16, 32, 64, 128)
"""Tokens, special tokens included: those that the encoder's limit allows are measured."""

TEXTS_A_LENGTH = 16
"""Different texts that take turns, so that no call repeats the one before."""

FULL_SAMPLES = 2000
QUICK_SAMPLES = 60


def run_latency(
    plan: Plan, runners: Sequence[Runner], shape: EncoderShape | None, results: Results, progress: Progress
) -> None:
    """Measure every runner at every length; runners, and their yardsticks, take turns within a length."""
    spec = plan.manifest.encoder
    tokenizer = bundle_tokenizer(plan.bundle / TOKENIZER_FILE, spec.max_tokens)
    lengths = [length for length in LENGTHS if length <= spec.max_tokens]
    calls = -(-(QUICK_SAMPLES if plan.quick else FULL_SAMPLES) // plan.rounds)
    failed: set[str] = set()
    with steps(progress, "latency", len(lengths) * len(runners) * plan.rounds) as done:
        for length in lengths:
            if results.has(f"latency {length}"):
                continue
            texts = texts_of_length(plan.workload.texts, tokenizer, length, count=TEXTS_A_LENGTH, seed=plan.seed)
            yardsticks = {
                runner.point.name: beside_one_text(runner.point, shape, length, results) for runner in runners
            }
            samples: dict[str, list[float]] = {name: [] for name in yardsticks}
            beside: dict[str, list[float]] = {name: [] for name in yardsticks}
            for _, runner in interleave(runners, plan.rounds):
                name = runner.point.name
                if name not in failed:
                    try:
                        samples[name] += time_calls(runner.encoder.encode, texts, calls)
                        if (yardstick := yardsticks[name]) is not None:
                            beside[name].append(1e3 * yardstick())
                    except MirrorError as error:
                        failed.add(name)
                        results.fail("latency", name, error)
                    else:
                        result = _result(plan, runner, length, samples[name], results)
                        results.latency[name, length] = replace(result, yardstick_ms=tuple(beside[name]))
                done(f"{name}, {length} tokens")
            results.finish(f"latency {length}")
    results.finish("latency")


def _result(plan: Plan, runner: Runner, tokens: int, samples: Sequence[float], results: Results) -> LatencyResult:
    point = runner.point
    ceiling = results.ceilings.get((point.engine, point.precision))
    return LatencyResult(
        point=point,
        streams=runner.encoder.engine.streams,
        tokens=tokens,
        floor_ms=floor_ms(tokens, point.precision, plan.flop_per_token, ceiling, results.bandwidth),
        samples_ms=tuple(samples),
        p50_ms=percentile(samples, 50),
        p90_ms=percentile(samples, 90),
        p99_ms=percentile(samples, 99),
        p999_ms=percentile(samples, 99.9),
    )
