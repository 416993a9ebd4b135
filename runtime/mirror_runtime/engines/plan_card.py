"""The card beside a TensorRT plan: where it was built and for which shapes. Check whether the plan may run here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mirror_runtime.bundle import Layout, Precision, TensorSpec, from_json
from mirror_runtime.errors import BundleError, EngineError
from mirror_runtime.strict_json import read_object

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlanCard:
    """The content of `<plan>.json`, which the build writes."""

    format_version: int
    tensorrt: str  # version that built the plan
    gpu: str  # name of the GPU it was built on
    compute_capability: str  # such as "8.9"
    platform: str  # system and machine; a plan runs on no other
    precision: Precision  # of the matrix products in the ONNX file
    layout: Layout
    onnx: str  # name of the graph
    onnx_sha256: str
    plan_sha256: str
    inputs: tuple[TensorSpec, ...]  # -1 is a free dimension
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]  # every input's smallest, usual and largest shape
    level: int  # of builder optimisation
    workspace_gib: float | None  # the builder's memory limit; None for no limit
    version_compatible: bool  # whether newer TensorRT versions may load it
    hardware: str  # "none", "ampere-plus" or "same-compute-capability"
    layers: int
    fused_attention: int  # how many layers are fused attention
    min_cosine: float | None  # None if only the manifest's certificate proves it
    build_s: float


def card_path(plan: Path) -> Path:
    """Return the path of a plan's card."""
    return plan.with_name(f"{plan.name}.json")


def read_card(plan: Path) -> PlanCard:
    """Read the card beside a plan."""
    path = card_path(plan)
    try:
        data = read_object(path, f"{plan.name} has no card")
        if data.get("format_version") != FORMAT_VERSION:
            raise BundleError(f"{path.name} is not a card of format version {FORMAT_VERSION}")
        return from_json(PlanCard, data, str(path))
    except BundleError as error:
        raise EngineError(f"{error}. Build the plan again with export/to_tensorrt.py") from error


def check_card(card: PlanCard, *, tensorrt: str, gpu: str, compute_capability: str) -> None:
    """Check that a plan was built for this TensorRT and this GPU, before TensorRT fails on it or runs it slowly."""
    again = "build it here with export/to_tensorrt.py"
    built, here = _numbers(card.tensorrt), _numbers(tensorrt)
    if card.version_compatible and here[0] < built[0]:
        raise EngineError(f"the plan is of TensorRT {card.tensorrt}, but the older {tensorrt} is installed: {again}")
    if not card.version_compatible and built != here:
        raise EngineError(f"the plan is of TensorRT {card.tensorrt}, but {tensorrt} is installed: {again}")
    fits = {
        "none": gpu == card.gpu and compute_capability == card.compute_capability,
        "ampere-plus": _numbers(compute_capability) >= (8, 0),
        "same-compute-capability": compute_capability == card.compute_capability,
    }
    if card.hardware not in fits:
        raise EngineError(f"the plan's card has hardware {card.hardware!r}: it must be one of {', '.join(fits)}")
    if not fits[card.hardware]:
        raise EngineError(
            f"the plan is built for {card.gpu} (compute capability {card.compute_capability}, hardware "
            f"compatibility {card.hardware}), but this is {gpu} ({compute_capability}): {again}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
