"""Suite `throughput`: the whole workload in one `encode` call, tokenising included, in rounds that take turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.progress import Progress

from benchmarks.results import Ceiling, ThroughputResult
from benchmarks.session import Plan, Results, Runner, steps
from benchmarks.summary import interleave, median
from mirror_runtime.errors import MirrorError


@dataclass(kw_only=True)
class Rounds:
    """The rounds of one runner: seconds of each, and what the encoder's counters gained over all of them."""

    runner: Runner
    texts: Sequence[str]
    samples_s: list[float] = field(default_factory=list)
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
        )


def run_throughput(plan: Plan, runners: Sequence[Runner], results: Results, progress: Progress) -> None:
    """Warm every runner with one whole pass, then let them take turns."""
    if results.has("throughput"):
        return  # rounds take turns within one run: half of them from another day would not
    parties = [Rounds(runner=runner, texts=plan.workload.texts) for runner in runners]
    failed: set[str] = set()
    with steps(progress, "throughput", len(parties) * (plan.rounds + 1)) as done:
        for round_, party in interleave(parties, plan.rounds + 1):
            point = party.runner.point
            if point.name not in failed:
                try:
                    if round_ == 0:
                        party.runner.encoder.encode(party.texts)
                    else:
                        party.run()
                        ceiling = results.ceilings.get((point.engine, point.precision))
                        results.throughput[point.name] = party.result(plan.flop_per_token, ceiling)
                except MirrorError as error:
                    failed.add(point.name)
                    results.fail("throughput", point.name, error)
            done(point.name)
    results.finish("throughput")
