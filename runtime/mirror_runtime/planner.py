"""Measure the ways to run a bundle on this host, in turns, and make a plan of the best.

The ways are not all combinations: first each artifact as it comes, then the streams of the best ones, then row lengths,
then batch sizes, each step from the best of the step before. Within a step all settings take turns, the best so far
among them, so that a machine that slows down slows all of them; only figures of one step are compared.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mirror_runtime.bundle import Artifact, EngineName, Layout, Precision, read_canaries, read_manifest
from mirror_runtime.cache import AUTO_CACHE
from mirror_runtime.canaries import CanaryComparison, CanaryVerdict, compare_canaries
from mirror_runtime.encoder import Encoder
from mirror_runtime.engines import installed
from mirror_runtime.errors import BundleError, EngineError, InputError, ParityError
from mirror_runtime.host import usable_cores
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
from mirror_runtime.vectors import components

ROW_LENGTHS = (32, 64, 128)
BATCH_TOKENS = (512, 1024, 2048)
FLOOR = 0.999
"""Worst cosine that a plan accepts where its caller names none: bf16 passes, 8-bit integers do not."""

MARGIN = 0.02
"""How much better a setting must be to replace the best so far: less is noise, and plans should not flutter."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to measure.

    Attributes:
        texts: encoded in each round.
        singles: texts encoded alone in each round.
        rounds: turns of each setting.
        survivors: artifacts whose streams are tried.
    """

    texts: int = 1024
    singles: int = 32
    rounds: int = 5
    survivors: int = 2


QUICK = Budget(texts=256, singles=8, rounds=2, survivors=1)


@dataclass(frozen=True, kw_only=True)
class PlannerProgress:
    """What a caller is told while it waits.

    Attributes:
        name: what is being varied.
        done: turns taken in this step.
        turns: turns of this step.
    """

    name: str
    done: int
    turns: int


@dataclass(frozen=True)
class _Candidate:
    """A setting that runs here, and its samples."""

    setting: Setting
    encoder: Encoder
    check: CanaryComparison
    bulk_s: list[float]
    single_s: list[float]


class Planner:
    """Measures a bundle's settings on this host.

    Args:
        bundle: the folder that export wrote.
        texts: what to measure with: at least a few hundred, like those that will be encoded.
        goal: what to make best.
        floor: worst cosine to accept, of the certificate and of the canaries here.
        budget: how long to measure.
        cache_dir: see `Encoder.load`.
        on_progress: told of each turn.

    Raises:
        BundleError: the folder is no bundle or has no canaries to check vectors against.
        InputError: there are no texts, or the floor is no cosine.
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
        on_progress: Callable[[PlannerProgress], None] = lambda _: None,
    ) -> None:
        if not 0 < floor <= 1:
            raise InputError(f"floor is {floor}: it is a cosine, such as {FLOOR}")
        self._budget = budget or Budget()
        if not texts:
            raise InputError("there are no texts to measure with: give some")
        self._bundle = bundle
        self._manifest = read_manifest(bundle)
        self._canaries = read_canaries(bundle)
        if not self._canaries:
            raise BundleError(f"{bundle} has no canaries to check vectors against: export it again")
        self._texts = _spread(texts, self._budget.texts)
        self._singles = sorted(_spread(texts, 4 * self._budget.singles), key=len)[: self._budget.singles]
        self._goal = goal
        self._floor = floor
        self._cache_dir = cache_dir
        self._on_progress = on_progress
        self._measured: dict[Setting, Trial] = {}
        self._best: Setting | None = None
        self.refused: dict[str, str] = {}
        """Artifacts that were not measured, by name, with the reason."""

    def plan(self) -> HostPlan:
        """Measure, and choose the best setting that reaches the floor.

        Raises:
            ParityError: no setting reaches it.
            EngineError: nothing in the bundle runs here.
        """
        cores = usable_cores()
        ways = self._candidates()
        self._step("artifacts", ways.values())
        if not self._measured:
            raise EngineError(
                f"nothing in the bundle runs here: {'; '.join(f'{k}: {v}' for k, v in self.refused.items())}"
            )
        accepted = [s for s, m in self._measured.items() if m.accepted]
        if self._best is None:
            worst = max(min(m.min_cosine, m.certified_cosine) for m in self._measured.values())
            raise ParityError(f"no artifact reaches the floor {self._floor}: the best has {worst:.6f}. Lower --floor")
        counts = {max(1, cores // 2), cores, 2 * cores if cores > 1 else 1, 1}
        survivors = sorted(accepted, key=self._merit)[: self._budget.survivors]
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
            measured=tuple(sorted(self._measured.values(), key=lambda m: objective(m, self._goal))),
        )

    def _candidates(self) -> dict[tuple[EngineName, Precision], Setting]:
        """Every packed artifact with the streams that its engine chooses itself."""
        ways: dict[tuple[EngineName, Precision], Setting] = {}
        for artifact in self._manifest.artifacts:
            name = f"{artifact.engine.value} {artifact.precision.value}"
            if artifact.layout is not Layout.PACKED:
                continue
            if not installed(artifact.engine):
                self.refused[name] = "is not installed"
                continue
            streams = usable_cores() if artifact.engine is EngineName.OPENVINO else 1
            ways[artifact.engine, artifact.precision] = Setting(
                engine=artifact.engine, precision=artifact.precision, streams=streams
            )
        return ways

    def _step(self, name: str, settings: Iterable[Setting]) -> None:
        """Let the settings that are not measured yet take turns, together with the best one so far."""
        new = [s for s in dict.fromkeys(settings) if s not in self._measured]
        if not new:
            return
        if self._best is not None:
            new.insert(0, self._best)
        turns = len(new) * self._budget.rounds
        with ExitStack() as stack:
            ways = [way for setting in new if (way := self._open(setting, stack)) is not None]
            done = 0
            for _ in range(self._budget.rounds):
                for way in ways:
                    self._on_progress(PlannerProgress(name=name, done=done, turns=turns))
                    self._turn(way)
                    done += 1
            for way in ways:
                self._measured[way.setting] = self._summary(way)
            self._choose([way.setting for way in ways])
            self._on_progress(PlannerProgress(name=name, done=turns, turns=turns))

    def _open(self, setting: Setting, stack: ExitStack) -> _Candidate | None:
        """Load a setting, check its vectors and run its shapes; None, with the reason kept, where it cannot run."""
        try:
            encoder = stack.enter_context(Encoder.of_setting(self._bundle, setting, self._cache_dir))
            vectors = encoder.encode(canary.text for canary in self._canaries)
            check = compare_canaries(components(vectors, encoder.spec), self._canaries, self._floor)
            encoder.encode(self._texts)
            encoder.encode(self._singles[:1])
        except EngineError as error:
            self.refused[f"{setting.engine.value} {setting.precision.value}"] = str(error)
            return None
        return _Candidate(setting, encoder, check, [], [])

    def _turn(self, way: _Candidate) -> None:
        began = time.perf_counter()
        way.encoder.encode(self._texts)
        way.bulk_s.append(time.perf_counter() - began)
        for text in self._singles:
            began = time.perf_counter()
            way.encoder.encode([text])
            way.single_s.append(time.perf_counter() - began)

    def _summary(self, way: _Candidate) -> Trial:
        certified = min(a.parity.min_cosine for a in self._manifest.artifacts if _is(a, way.setting))
        return Trial(
            setting=way.setting,
            texts_per_s=len(self._texts) / statistics.median(way.bulk_s),
            p50_ms=1000 * statistics.median(way.single_s),
            min_cosine=way.check.min_cosine if way.check.min_cosine is not None else -1.0,
            certified_cosine=certified,
            accepted=way.check.verdict is CanaryVerdict.AGREES and certified >= self._floor,
        )

    def _merit(self, setting: Setting) -> float:
        return objective(self._measured[setting], self._goal)

    def _choose(self, rivals: Sequence[Setting]) -> None:
        """Replace the best so far where a setting measured beside it is clearly better."""
        accepted = [s for s in rivals if self._measured[s].accepted]
        if not accepted:
            return
        leader = min(accepted, key=self._merit)
        # Of two merits the smaller is better; throughput counts negative, which turns the margin round.
        bar = self._merit(self._best) if self._best is not None else math.inf
        if self._merit(leader) < bar - MARGIN * abs(bar) or self._best is None:
            self._best = leader


def _is(artifact: Artifact, setting: Setting) -> bool:
    return (artifact.engine, artifact.precision, artifact.layout) == (setting.engine, setting.precision, Layout.PACKED)


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """Pick texts at equal distances; all of them where there are fewer."""
    return list(texts[:: max(1, len(texts) // count)][:count])
