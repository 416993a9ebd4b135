"""The plan: what was measured to be the best way to run a bundle on this host, and whether it still holds.

`mirror plan` writes it (see `planning`), `Encoder.load` follows it where the caller says "auto".
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mirror_runtime.bundle import Artifact, EngineName, Manifest, Precision, from_json, to_json
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.folders import replace_file
from mirror_runtime.host import cpu_flags, cpu_model, usable_cores
from mirror_runtime.packing import ROW_TOKENS, TOKEN_BUDGET
from mirror_runtime.selection import AUTO, choose

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
PACKAGES = ("mirror-runtime", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tokenizers")
"""Whose versions a plan holds for."""


class Goal(str, Enum):
    """What a plan makes best."""

    LATENCY = "latency"
    """The median time of one short text alone."""
    THROUGHPUT = "throughput"
    """Texts a second when there are many."""


class DecisionSource(str, Enum):
    """Who decided how a bundle runs."""

    ASKED = "asked"
    """The caller named engine and precision."""
    PLAN = "plan"
    """A plan measured on this host."""
    RULE = "rule"
    """`mirror_runtime.selection.PREFERENCE`."""


@dataclass(frozen=True, kw_only=True)
class HostIdentity:
    """What a plan's figures depend on besides software.

    Attributes:
        cpu: the model.
        features: hash of the CPU's feature flags.
        cores: usable by the process that measured.
    """

    cpu: str
    features: str
    cores: int

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name this host."""
        return _digest([self.cpu, self.features, self.cores])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a bundle.

    Attributes:
        engine: the library.
        precision: of the heavy products.
        streams: batches in flight.
        row_tokens: length of the everyday row.
        batch_tokens: tokens of a full batch.
    """

    engine: EngineName
    precision: Precision
    streams: int
    row_tokens: int = ROW_TOKENS
    batch_tokens: int = TOKEN_BUDGET

    def __str__(self) -> str:
        return (
            f"{self.engine.value} {self.precision.value}, {self.streams} streams, rows of {self.row_tokens}, "
            f"batches of {self.batch_tokens} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a setting gave on this host; medians of rounds in which all settings took turns.

    Attributes:
        setting: what ran.
        texts_per_s: many texts at once, tokenising included.
        p50_ms: one short text alone, tokenising included.
        min_cosine: the worst canary against its reference vector, here.
        certified_cosine: the artifact's worst text when it was made.
        accepted: whether both reach the plan's floor.
    """

    setting: Setting
    texts_per_s: float
    p50_ms: float
    min_cosine: float
    certified_cosine: float
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """The content of a plan file.

    Attributes:
        format_version: of this schema; `FORMAT_VERSION`.
        goal: what `chosen` is best at.
        floor: worst cosine that was accepted.
        fingerprint: the bundle's.
        host: where it was measured.
        versions: packages that it was measured with.
        texts: how many texts a round encoded.
        rounds: how often each setting took its turn.
        chosen: the best accepted setting.
        measured: everything that was tried.
    """

    format_version: int
    goal: Goal
    floor: float
    fingerprint: str
    host: HostIdentity
    versions: Mapping[str, str]
    texts: int
    rounds: int
    chosen: Setting
    measured: tuple[Trial, ...]

    def best(self, engine: str = AUTO, precision: str = AUTO) -> Setting | None:
        """Give the best accepted setting of what was asked for; None where nothing such was accepted."""
        if AUTO == engine == precision:
            return self.chosen
        fitting = [
            m
            for m in self.measured
            if m.accepted and engine in (AUTO, m.setting.engine) and precision in (AUTO, m.setting.precision)
        ]
        return min(fitting, key=lambda m: objective(m, self.goal)).setting if fitting else None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How a bundle will run, and why.

    Attributes:
        engine: the library.
        precision: of the heavy products.
        artifact: what proves them; None for the fake engine alone.
        streams: batches in flight; None lets the engine choose.
        row_tokens: length of the everyday row.
        batch_tokens: tokens of a full batch.
        source: who decided.
    """

    engine: EngineName
    precision: Precision
    artifact: Artifact | None = None
    streams: int | None = None
    row_tokens: int = ROW_TOKENS
    batch_tokens: int = TOKEN_BUDGET
    source: DecisionSource = DecisionSource.ASKED


def objective(measured: Trial, goal: Goal) -> float:
    """Give the number that a goal wants small."""
    return measured.p50_ms if goal is Goal.LATENCY else -measured.texts_per_s


def decide(manifest: Manifest, engine: str, precision: str, plan: HostPlan | None) -> Decision:
    """Choose how to run a bundle: what was asked for, else the plan, else the rule.

    Args:
        manifest: the bundle's.
        engine: an engine's name or "auto".
        precision: a precision's name or "auto".
        plan: what was measured here; None where nothing was.

    Raises:
        EngineError: see `mirror_runtime.selection.choose`.
    """
    open_choice = AUTO in (engine, precision)
    setting = plan.best(engine, precision) if plan is not None and open_choice else None
    if setting is None:
        name, runs_in, artifact = choose(manifest, engine, precision)
        return Decision(
            engine=name,
            precision=runs_in,
            artifact=artifact,
            source=DecisionSource.RULE if open_choice else DecisionSource.ASKED,
        )
    name, runs_in, artifact = choose(manifest, setting.engine.value, setting.precision.value)
    return Decision(
        engine=name,
        precision=runs_in,
        artifact=artifact,
        streams=setting.streams,
        row_tokens=setting.row_tokens,
        batch_tokens=setting.batch_tokens,
        source=DecisionSource.PLAN,
    )


def this_host() -> HostIdentity:
    """Describe the host that this process runs on."""
    return HostIdentity(cpu=cpu_model(), features=_digest(sorted(cpu_flags())), cores=usable_cores())


def installed_versions() -> dict[str, str]:
    """Give the versions of the installed packages that a plan depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def plan_path(cache: Path, fingerprint: str) -> Path:
    """Say where this host's plan for a bundle is kept."""
    return cache / "plans" / f"{fingerprint}-{this_host().key}.json"


def write_plan(plan: HostPlan, path: Path) -> None:
    """Write a plan file, whole or not at all.

    Raises:
        InputError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path, shared=True) as beside:
            beside.write_text(json.dumps(to_json(plan), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def read_plan(path: Path) -> HostPlan:
    """Read a plan file.

    Raises:
        InputError: it is missing, malformed or of another format version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no plan: {error}. Make one with mirror plan") from error
    found = data.get("format_version") if isinstance(data, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(f"{path} has plan format {found!r} and this mirror_runtime reads {FORMAT_VERSION}: plan again")
    try:
        return from_json(HostPlan, data, str(path))
    except BundleError as error:
        raise InputError(f"{error}. Make the plan again with mirror plan") from error


def staleness(plan: HostPlan, fingerprint: str) -> str:
    """Say why a plan does not hold for this bundle on this host; empty where it does."""
    if plan.fingerprint != fingerprint:
        return f"it is for the bundle {plan.fingerprint}, not {fingerprint}"
    host = this_host()
    if plan.host != host:
        return f"it was measured on {plan.host.cores} cores of {plan.host.cpu}, here are {host.cores} of {host.cpu}"
    versions = installed_versions()
    changed = [
        f"{name} {plan.versions.get(name, 'absent')} (now {versions.get(name, 'absent')})"
        for name in PACKAGES
        if plan.versions.get(name) != versions.get(name)
    ]
    return f"it was measured with {', '.join(changed)}" if changed else ""


def find_plan(choice: str | Path | None, cache: Path | None, fingerprint: str) -> HostPlan | None:
    """Find the plan that a caller may follow.

    Args:
        choice: a plan file, which must hold here; "auto" for this host's own, if there is one and it holds; or None.
        cache: where this host's own plans are kept.
        fingerprint: the bundle's.

    Raises:
        InputError: the file that was named is no plan, or does not hold here.
    """
    if choice is None or (choice == AUTO and cache is None):
        return None
    if choice != AUTO:
        plan = read_plan(Path(choice))
        if reason := staleness(plan, fingerprint):
            raise InputError(f"{choice} does not hold here: {reason}. Make a plan with mirror plan")
        return plan
    assert cache is not None
    path = plan_path(cache, fingerprint)
    if not path.exists():
        return None
    try:
        plan = read_plan(path)
        reason = staleness(plan, fingerprint)
    except InputError as error:
        reason = str(error)
    if reason:
        _log.warning("the plan %s is not followed: %s. Run mirror plan again", path.name, reason)
        return None
    return plan


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
