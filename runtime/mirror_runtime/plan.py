"""Plans: the fastest setting measured for a bundle on this host, and whether that is still valid.

`mirror plan` writes a plan (see `planner`); `Encoder.load` follows it for "auto".
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
"""A plan is only valid for the versions of these packages that it was measured with."""


class Goal(str, Enum):
    """What a plan optimises."""

    LATENCY = "latency"
    """The median time of one short text alone."""
    THROUGHPUT = "throughput"
    """Texts per second when there are many."""


class DecisionSource(str, Enum):
    """Who decided how a bundle runs."""

    ASKED = "asked"
    """The caller named the engine and the precision."""
    PLAN = "plan"
    """A plan measured on this host."""
    RULE = "rule"
    """`mirror_runtime.selection.PREFERENCE`."""


@dataclass(frozen=True, kw_only=True)
class HostIdentity:
    """The hardware that a plan's figures depend on.

    Attributes:
        cpu: model name.
        features: hash of the CPU's feature flags.
        cores: cores usable by the measuring process.
    """

    cpu: str
    features: str
    cores: int

    @property
    def key(self) -> str:
        """Return twelve hexadecimal digits that identify this host."""
        return _digest([self.cpu, self.features, self.cores])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a bundle.

    Attributes:
        engine: the library.
        precision: of the matrix products.
        streams: batches in flight.
        row_tokens: the default row length.
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
    """The measurements of one setting on this host: medians over interleaved rounds.

    Attributes:
        setting: the setting.
        texts_per_s: throughput of many texts, tokenising included.
        p50_ms: median time of one short text alone, tokenising included.
        min_cosine: the worst canary's cosine with its reference vector, on this host.
        certified_cosine: the worst text's cosine in the artifact's certificate.
        accepted: whether both cosines reach the plan's floor.
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
        goal: what `chosen` optimises.
        floor: the smallest cosine accepted.
        fingerprint: the bundle's.
        host: the host that was measured.
        versions: the packages it was measured with.
        texts: texts encoded in each round.
        rounds: how often each setting was measured.
        chosen: the best accepted setting.
        measured: every setting that was measured.
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
        """Return the best accepted setting with this engine and precision; None if none was accepted."""
        if AUTO == engine == precision:
            return self.chosen
        fitting = [
            trial
            for trial in self.measured
            if trial.accepted
            and engine in (AUTO, trial.setting.engine)
            and precision in (AUTO, trial.setting.precision)
        ]
        return min(fitting, key=lambda trial: objective(trial, self.goal)).setting if fitting else None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How a bundle will run, and why.

    Attributes:
        engine: the library.
        precision: of the matrix products.
        artifact: the proven artifact; None for the fake engine, and for a graph that export is proving.
        streams: batches in flight; None lets the engine choose.
        row_tokens: the default row length.
        batch_tokens: tokens of a full batch.
        source: where the decision came from.
    """

    engine: EngineName
    precision: Precision
    artifact: Artifact | None = None
    streams: int | None = None
    row_tokens: int = ROW_TOKENS
    batch_tokens: int = TOKEN_BUDGET
    source: DecisionSource = DecisionSource.ASKED


def objective(trial: Trial, goal: Goal) -> float:
    """Return the number to minimise for a goal."""
    return trial.p50_ms if goal is Goal.LATENCY else -trial.texts_per_s


def decide(manifest: Manifest, engine: str, precision: str, plan: HostPlan | None) -> Decision:
    """Choose how to run a bundle: as the caller says, else by the plan, else by the rule.

    Args:
        manifest: the bundle's.
        engine: an engine's name or "auto".
        precision: a precision's name or "auto".
        plan: this host's plan; None without one.

    Raises:
        EngineError: see `mirror_runtime.selection.choose`.
    """
    auto = AUTO in (engine, precision)
    setting = plan.best(engine, precision) if plan is not None and auto else None
    if setting is None:
        name, runs_in, artifact = choose(manifest, engine, precision)
        source = DecisionSource.RULE if auto else DecisionSource.ASKED
        return Decision(engine=name, precision=runs_in, artifact=artifact, source=source)
    return decide_setting(manifest, setting)


def decide_setting(manifest: Manifest, setting: Setting) -> Decision:
    """Find the artifact of a setting.

    Raises:
        EngineError: see `mirror_runtime.selection.choose`.
    """
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
    """Identify the host that this process runs on."""
    return HostIdentity(cpu=cpu_model(), features=_digest(sorted(cpu_flags())), cores=usable_cores())


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed packages that a plan depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def plan_path(cache: Path, fingerprint: str) -> Path:
    """Return the path of this host's plan for a bundle."""
    return cache / "plans" / f"{fingerprint}-{this_host().key}.json"


def write_plan(plan: HostPlan, path: Path) -> None:
    """Write a plan file, whole or not at all.

    Raises:
        InputError: the path cannot be written.
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
        raise InputError(f"{path} is not a plan: {error}. Make one with mirror plan") from error
    found = data.get("format_version") if isinstance(data, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(
            f"{path} has plan format {found!r}, but this mirror_runtime reads {FORMAT_VERSION}: run mirror plan again"
        )
    try:
        return from_json(HostPlan, data, str(path))
    except BundleError as error:
        raise InputError(f"{error}. Run mirror plan again") from error


def staleness(plan: HostPlan, fingerprint: str) -> str:
    """Return why a plan is not valid for this bundle on this host; empty if it is valid."""
    if plan.fingerprint != fingerprint:
        return f"it is for the bundle {plan.fingerprint}, not {fingerprint}"
    host = this_host()
    if plan.host != host:
        return f"it was measured on {plan.host.cores} cores of {plan.host.cpu}, not on {host.cores} of {host.cpu}"
    versions = installed_versions()
    changed = [
        f"{name} {plan.versions.get(name, 'absent')} (now {versions.get(name, 'absent')})"
        for name in PACKAGES
        if plan.versions.get(name) != versions.get(name)
    ]
    return f"it was measured with {', '.join(changed)}" if changed else ""


def find_plan(choice: str | Path | None, cache: Path | None, fingerprint: str) -> HostPlan | None:
    """Find the plan to follow.

    Args:
        choice: a plan file, which must be valid here; "auto" for this host's own if it exists and is valid; or None.
        cache: the folder of this host's own plans.
        fingerprint: the bundle's.

    Raises:
        InputError: the named file is not a plan, or is not valid here.
    """
    if choice is None or (choice == AUTO and cache is None):
        return None
    if choice != AUTO:
        plan = read_plan(Path(choice))
        if reason := staleness(plan, fingerprint):
            raise InputError(f"{choice} is not valid here: {reason}. Make a plan with mirror plan")
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
