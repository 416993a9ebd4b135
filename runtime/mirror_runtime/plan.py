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

from mirror_runtime.bundle import MOST_TOKENS, Artifact, EngineName, Manifest, Precision, from_json, to_json
from mirror_runtime.engines import ON_GPU
from mirror_runtime.errors import BundleError, EngineError, InputError
from mirror_runtime.folders import named_os_errors, replace_file
from mirror_runtime.gpu import gpu_models, this_gpu
from mirror_runtime.host import cpu_flags, cpu_model, usable_cores
from mirror_runtime.packing import ROW_TOKENS, TOKEN_BUDGET
from mirror_runtime.selection import AUTO, choose
from mirror_runtime.strict_json import read_object, short

_log = logging.getLogger(__name__)

FORMAT_VERSION = 2
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
    """The hardware that a plan's figures depend on."""

    cpu: str  # model name
    features: str  # hash of the CPU's feature flags
    cores: int  # usable by the measuring process
    gpu: str  # the models of its GPUs; empty for none

    def __str__(self) -> str:
        return f"{self.cores} cores of {self.cpu}" + (f" with {self.gpu}" if self.gpu else "")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a bundle."""

    engine: EngineName
    precision: Precision
    streams: int  # batches in flight
    row_tokens: int = ROW_TOKENS  # the default row length
    batch_tokens: int = TOKEN_BUDGET  # of a full batch

    def __post_init__(self) -> None:
        for name in ("streams", "row_tokens", "batch_tokens"):
            if not 1 <= getattr(self, name) <= MOST_TOKENS:
                raise BundleError(f"{name} is {getattr(self, name)}: it must be between 1 and {MOST_TOKENS}")

    def __str__(self) -> str:
        return (
            f"{self.engine.value} {self.precision.value}, {self.streams} streams, rows of {self.row_tokens}, "
            f"batches of {self.batch_tokens} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The measurements of one setting on this host: medians over interleaved rounds."""

    setting: Setting
    texts_per_s: float  # many texts, tokenising included
    p50_ms: float  # of one short text alone, tokenising included
    min_cosine: float  # the worst canary's, with its reference vector, on this host
    certified_cosine: float  # the worst text's in the artifact's certificate
    accepted: bool  # whether both cosines reach the plan's floor


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """The content of a plan file."""

    format_version: int
    goal: Goal  # what `chosen` optimises
    floor: float  # the smallest cosine accepted
    fingerprint: str  # the bundle's
    host: HostIdentity
    versions: Mapping[str, str]  # of the packages it was measured with
    texts: int  # encoded in each round
    rounds: int  # how often each setting was measured
    chosen: Setting  # the best accepted setting
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
    """How a bundle will run, and why."""

    engine: EngineName
    precision: Precision
    artifact: Artifact | None = None  # None for the fake engine, and for a graph that export is proving
    streams: int | None = None  # batches in flight; None lets the engine choose
    row_tokens: int = ROW_TOKENS  # the default row length
    batch_tokens: int = TOKEN_BUDGET  # of a full batch
    source: DecisionSource = DecisionSource.ASKED


def objective(trial: Trial, goal: Goal) -> float:
    """Return the number to minimise for a goal."""
    return trial.p50_ms if goal is Goal.LATENCY else -trial.texts_per_s


def decide(manifest: Manifest, engine: str, precision: str, plan: HostPlan | None) -> Decision:
    """Choose how to run a bundle: as the caller names it, else by this host's plan, else by the rule."""
    auto = AUTO in (engine, precision)
    setting = plan.best(engine, precision) if plan is not None and auto else None
    if setting is None:
        name, runs_in, artifact = choose(manifest, engine, precision)
        source = DecisionSource.RULE if auto else DecisionSource.ASKED
        return Decision(engine=name, precision=runs_in, artifact=artifact, source=source)
    return decide_setting(manifest, setting)


def decide_setting(manifest: Manifest, setting: Setting) -> Decision:
    """Find the artifact of a setting."""
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
    return HostIdentity(cpu=cpu_model(), features=_digest(sorted(cpu_flags())), cores=usable_cores(), gpu=gpu_models())


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
    host = this_host()
    return cache / "plans" / f"{fingerprint}-{_digest([host.cpu, host.features, host.cores, host.gpu])}.json"


def write_plan(plan: HostPlan, path: Path) -> None:
    """Write a plan file, whole or not at all."""
    with named_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path, shared=True) as beside:
            beside.write_text(json.dumps(to_json(plan), indent=2) + "\n", encoding="utf-8")


def read_plan(path: Path) -> HostPlan:
    """Read a plan file. An `InputError` means that it is missing, malformed or of another format version."""
    try:
        data = read_object(path, "there is no plan")
        if (found := data.get("format_version")) != FORMAT_VERSION:
            raise BundleError(f"{path} has plan format {short(found)}; this mirror_runtime reads {FORMAT_VERSION}")
        return from_json(HostPlan, data, str(path))
    except BundleError as error:
        raise InputError(f"{error}. Run mirror plan again") from error


def staleness(plan: HostPlan, fingerprint: str) -> str:
    """Return why a plan is not valid for this bundle on this host; empty if it is valid."""
    if plan.fingerprint != fingerprint:
        return f"it is for the bundle {plan.fingerprint}, not {fingerprint}"
    host = this_host()
    if plan.host != host:
        return f"it was measured on {plan.host}, not on {host}"
    versions = installed_versions()
    changed = [
        f"{name} {plan.versions.get(name, 'absent')} (now {versions.get(name, 'absent')})"
        for name in PACKAGES
        if plan.versions.get(name) != versions.get(name)
    ]
    if changed:
        return f"it was measured with {', '.join(changed)}"
    try:
        if plan.chosen.engine in ON_GPU:
            this_gpu()
    except EngineError as error:  # the machine has a GPU, but not this process: see CUDA_VISIBLE_DEVICES
        return f"it runs on a GPU, and {error}"
    return ""


def find_plan(choice: str | Path | None, cache: Path | None, fingerprint: str) -> HostPlan | None:
    """Find the plan to follow: a named file, which must be valid here, or for "auto" this host's own, if it is valid.

    `cache` is the folder of this host's own plans.
    """
    if choice is None or (choice == AUTO and cache is None):
        return None
    if choice != AUTO:
        plan = read_plan(Path(choice))
        if reason := staleness(plan, fingerprint):
            raise InputError(f"{choice} is not valid here: {' '.join(reason.split())}. Make a plan with mirror plan")
        return plan
    assert cache is not None
    path = plan_path(cache, fingerprint)
    if not path.exists():
        return None
    try:
        plan = read_plan(path)
        reason = staleness(plan, fingerprint)
        reason += ". Run mirror plan again" if reason else ""
    except InputError as error:
        reason = str(error)
    if reason:
        _log.warning("the plan %s is not followed: %s", path.name, reason)
        return None
    return plan


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
