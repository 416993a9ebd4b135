"""One text at a time, ours and other libraries' in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from benchmarks.latency import FULL_SAMPLES, QUICK_SAMPLES, TEXTS_A_LENGTH
from benchmarks.peer_results import SingleTexts
from benchmarks.peers.protocol import time_calls
from benchmarks.peers.worker import PeerWorker
from benchmarks.session import Plan, Results, Runner, steps
from benchmarks.summary import interleave, percentile
from benchmarks.workload import bundle_tokenizer, texts_of_length
from mirror_runtime.bundle import TOKENIZER_FILE
from mirror_runtime.errors import InputError, MirrorError

TOKENS = 16
"""A short sentence, special tokens included."""

SETTLE_S = 0.25
"""Pause between parties: a library's threads may go on spinning for a while after its last call."""


def run_single_texts(
    plan: Plan,
    parties: Sequence[tuple[str, Runner | PeerWorker]],
    scratch: Path,
    results: Results,
    progress: Progress,
) -> None:
    """Let every party encode single texts, in turns; who fails is noted and left out.

    Args:
        plan: what is measured.
        parties: by name: ours, and peers that have loaded the model.
        scratch: for what peers read.
        results: where results go after every round.
        progress: for the bar.
    """
    tokenizer = bundle_tokenizer(plan.bundle / TOKENIZER_FILE, plan.manifest.encoder.max_tokens)
    try:
        texts = texts_of_length(plan.workload.texts, tokenizer, TOKENS, count=TEXTS_A_LENGTH, seed=plan.seed)
    except InputError as error:
        results.fail("peers", "single texts", error)
        return
    file = scratch / "single.json"
    file.write_text(json.dumps(texts), encoding="utf-8")
    calls = -(-(QUICK_SAMPLES if plan.quick else FULL_SAMPLES) // plan.rounds)
    samples: dict[str, list[float]] = {name: [] for name, _ in parties}
    failed: set[str] = set()
    with steps(progress, "peers: single texts", len(parties) * plan.rounds) as done:
        for _, (name, party) in interleave(parties, plan.rounds):
            if name not in failed:
                time.sleep(SETTLE_S)
                try:
                    if isinstance(party, Runner):
                        samples[name] += time_calls(party.encoder.encode, texts, calls)
                    else:
                        samples[name] += party.ask("single", texts=str(file), calls=calls)["samples_ms"]
                except MirrorError as error:
                    failed.add(name)
                    results.fail("peers", f"{name}, single texts", error)
                else:
                    results.single_texts[name] = _result(name, samples[name], ours=isinstance(party, Runner))
            done(name)


def _result(party: str, samples: Sequence[float], *, ours: bool) -> SingleTexts:
    return SingleTexts(
        party=party,
        ours=ours,
        tokens=TOKENS,
        samples_ms=tuple(round(sample, 4) for sample in samples),
        p50_ms=percentile(samples, 50),
        p90_ms=percentile(samples, 90),
        p99_ms=percentile(samples, 99),
    )
