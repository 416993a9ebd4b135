"""Measure the settings that a bundle can run with on this host, and make a plan of the best.

Not all combinations are measured: first each artifact with its defaults, then the streams of the best ones, then row
lengths, then batch sizes, each step from the best of the step before. The settings of a step are measured in
interleaved rounds together with the best so far, so that a machine that slows down slows all of them; only figures of
one step are compared.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mirror_runtime.bundle import EngineName, Layout, read_canaries, read_manifest
from mirror_runtime.cache import AUTO_CACHE
from mirror_runtime.canaries import CanaryComparison, CanaryVerdict, canary_vectors, compare_canaries
from mirror_runtime.encoder import Encoder
from mirror_runtime.engines import installed
from mirror_runtime.errors import BundleError, EngineError, InputError, ParityError
from mirror_runtime.host import usable_cores
from mirror_runtime.pairs import canary_items, items_for
from mirror_runtime.plan import (
    FORMAT_VERSION,
    Goal,
    HostPlan,
    Setting,
    Trial,
    installed_versions,
    objective,
    this_host,
)
from mirror_runtime.tokenizer import Item, characters

ROW_LENGTHS = (32, 64, 128)
BATCH_TOKENS = (512, 1024, 2048)
FLOOR = 0.999
"""The smallest cosine that a plan accepts by default: bf16 passes, 8-bit integers do not."""

MARGIN = 0.02
"""How much better a setting must be to replace the best so far: less is noise, and plans should be stable."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to measure."""

    texts: int = 1024  # encoded together in each round
    singles: int = 32  # texts encoded one by one in each round
    rounds: int = 5
    survivors: int = 2  # artifacts whose streams are varied


QUICK = Budget(texts=256, singles=8, rounds=2, survivors=1)


@dataclass(frozen=True)
class _Candidate:
    """A setting that runs here, and its measurements."""

    setting: Setting
    encoder: Encoder
    check: CanaryComparison
    bulk_s: list[float]
    single_s: list[float]


class Planner:
    """Measures a bundle's settings on this host.

    Args:
        bundle: the folder that export wrote.
        texts: texts to measure with: at least a few hundred, like those that will be encoded.
        goal: what to optimise.
        floor: the smallest cosine to accept, in the certificate and for the canaries on this host.
        budget: how much to measure.
        cache_dir: see `Encoder.load`.
        on_progress: called before each measurement and at the end of each step, with what the step varies, the
            measurements done in it, and all of them.
    """

    def __init__(
        self,
        bundle: Path,
        texts: Sequence[str],
        *,
        goal: Goal = Goal.THROUGHPUT,
        floor: float = FLOOR,
        budget: Budget | None = None,
        cache_dir: str | Path | None = AUTO_CACHE,
        on_progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        if not 0 < floor <= 1:
            raise InputError(f"floor is {floor}: it must be a cosine, such as {FLOOR}")
        self._budget = budget or Budget()
        if not texts:
            raise InputError("there are no texts to measure with: pass some")
        self._bundle = bundle
        self._manifest = read_manifest(bundle)
        self._canaries = read_canaries(bundle)
        if not self._canaries:
            raise BundleError(f"{bundle} has no canaries to check vectors against: export it again")
        items = items_for(self._manifest.encoder, texts)
        self._texts = _spread(items, self._budget.texts)
        self._singles = sorted(_spread(items, 4 * self._budget.singles), key=characters)[: self._budget.singles]
        self._goal = goal
        self._floor = floor
        self._cache_dir = cache_dir
        self._on_progress = on_progress
        self._measured: dict[Setting, Trial] = {}
        self._best: Setting | None = None
        self.refused: dict[str, str] = {}
        """Artifacts that could not be measured, by name, with the reason."""

    def plan(self) -> HostPlan:
        """Measure the settings, and choose the best one that reaches the floor; a `ParityError` if none does."""
        cores = usable_cores()
        self._step("artifacts", self._defaults())
        if not self._measured:
            raise EngineError(
                f"nothing in the bundle runs here: {'; '.join(f'{k}: {v}' for k, v in self.refused.items())}"
            )
        accepted = [setting for setting, trial in self._measured.items() if trial.accepted]
        if self._best is None:
            reached = max(min(trial.min_cosine, trial.certified_cosine) for trial in self._measured.values())
            raise ParityError(f"no artifact reaches the floor {self._floor}: the best has {reached:.6f}. Lower --floor")
        counts = {max(1, cores // 2), cores, 2 * cores if cores > 1 else 1, 1}
        survivors = sorted(accepted, key=self._objective)[: self._budget.survivors]
        self._step("streams", [replace(s, streams=n) for s in survivors for n in sorted(counts)])
        self._step("row lengths", [replace(self._best, row_tokens=n) for n in ROW_LENGTHS])
        self._step("batch sizes", [replace(self._best, batch_tokens=n) for n in BATCH_TOKENS])
        return HostPlan(
            format_version=FORMAT_VERSION,
            goal=self._goal,
            floor=self._floor,
            fingerprint=self._manifest.fingerprint,
            host=this_host(),
            versions=installed_versions(),
            texts=len(self._texts),
            rounds=self._budget.rounds,
            chosen=self._best,
            measured=tuple(sorted(self._measured.values(), key=lambda trial: objective(trial, self._goal))),
        )

    def _defaults(self) -> list[Setting]:
        """List the packed artifacts that can run here: one stream per core for OpenVINO, one for the others."""
        settings = []
        for artifact in self._manifest.artifacts:
            if artifact.layout is not Layout.PACKED:
                continue
            if not installed(artifact.engine):
                self.refused[f"{artifact.engine.value} {artifact.precision.value}"] = "is not installed"
                continue
            streams = usable_cores() if artifact.engine is EngineName.OPENVINO else 1
            settings.append(Setting(engine=artifact.engine, precision=artifact.precision, streams=streams))
        return settings

    def _step(self, name: str, settings: Iterable[Setting]) -> None:
        """Measure the new settings in interleaved rounds, together with the best one so far."""
        new = [s for s in dict.fromkeys(settings) if s not in self._measured]
        if not new:
            return
        if self._best is not None:
            new.insert(0, self._best)
        turns = len(new) * self._budget.rounds
        with ExitStack() as stack:
            candidates = [found for setting in new if (found := self._open(setting, stack)) is not None]
            done = 0
            for _ in range(self._budget.rounds):
                for candidate in candidates:
                    self._on_progress(name, done, turns)
                    self._measure(candidate)
                    done += 1
            for candidate in candidates:
                self._measured[candidate.setting] = self._summary(candidate)
            self._choose([candidate.setting for candidate in candidates])
            self._on_progress(name, turns, turns)

    def _open(self, setting: Setting, stack: ExitStack) -> _Candidate | None:
        """Load a setting, check its vectors and run its shapes; None if it cannot run, with the reason in `refused`."""
        try:
            encoder = stack.enter_context(Encoder.of_setting(self._bundle, setting, self._cache_dir))
            items = canary_items(encoder.spec, [canary.text for canary in self._canaries])
            vectors = canary_vectors(encoder.encode_detailed(items), encoder.spec)
            check = compare_canaries(vectors, self._canaries, self._floor)
            _run(encoder, self._texts)
            _run(encoder, self._singles[:1])
        except EngineError as error:
            self.refused[f"{setting.engine.value} {setting.precision.value}"] = str(error)
            return None
        return _Candidate(setting, encoder, check, [], [])

    def _measure(self, candidate: _Candidate) -> None:
        began = time.perf_counter()
        _run(candidate.encoder, self._texts)
        candidate.bulk_s.append(time.perf_counter() - began)
        for text in self._singles:
            began = time.perf_counter()
            _run(candidate.encoder, [text])
            candidate.single_s.append(time.perf_counter() - began)

    def _summary(self, candidate: _Candidate) -> Trial:
        setting, check = candidate.setting, candidate.check
        certified = min(
            artifact.parity.min_cosine
            for artifact in self._manifest.artifacts
            if artifact.layout is Layout.PACKED
            and (artifact.engine, artifact.precision) == (setting.engine, setting.precision)
        )
        return Trial(
            setting=setting,
            texts_per_s=len(self._texts) / statistics.median(candidate.bulk_s),
            p50_ms=1000 * statistics.median(candidate.single_s),
            min_cosine=check.min_cosine if check.min_cosine is not None else -1.0,
            certified_cosine=certified,
            accepted=check.verdict is CanaryVerdict.AGREES and certified >= self._floor,
        )

    def _objective(self, setting: Setting) -> float:
        return objective(self._measured[setting], self._goal)

    def _choose(self, rivals: Sequence[Setting]) -> None:
        """Replace the best setting so far if one measured together with it is clearly better."""
        accepted = [setting for setting in rivals if self._measured[setting].accepted]
        if not accepted:
            return
        leader = min(accepted, key=self._objective)
        # The smaller objective is better. That of throughput is negative, hence the absolute value.
        bar = self._objective(self._best) if self._best is not None else math.inf
        if self._objective(leader) < bar - MARGIN * abs(bar) or self._best is None:
            self._best = leader


def _run(encoder: Encoder, texts: Sequence[Item]) -> None:
    encoder.encode_detailed(texts).vectors_or_raise()


def _spread(texts: Sequence[Item], count: int) -> list[Item]:
    """Pick evenly spaced texts; all of them if there are fewer."""
    return list(texts[:: max(1, len(texts) // count)][:count])
