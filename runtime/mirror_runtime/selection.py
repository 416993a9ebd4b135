"""Choose the artifact of a bundle that runs here: the one that the caller names, or for "auto" by a documented rule."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from mirror_runtime.bundle import Artifact, EngineName, Layout, Manifest, Precision
from mirror_runtime.engines import ON_GPU, installed
from mirror_runtime.errors import EngineError, install_command
from mirror_runtime.gpu import this_gpu
from mirror_runtime.host import has_bf16

_log = logging.getLogger(__name__)

AUTO = "auto"

PREFERENCE = (
    (EngineName.TENSORRT, Precision.FP16),
    (EngineName.TENSORRT, Precision.BF16),
    (EngineName.ONNXRUNTIME_TENSORRT, Precision.FP16),
    (EngineName.ONNXRUNTIME_CUDA, Precision.FP16),
    (EngineName.ONNXRUNTIME_CUDA, Precision.BF16),
    (EngineName.TENSORRT, Precision.FP32),
    (EngineName.ONNXRUNTIME_CUDA, Precision.FP32),
    (EngineName.OPENVINO, Precision.BF16),
    (EngineName.ONNXRUNTIME, Precision.FP32),
    (EngineName.OPENVINO, Precision.FP32),
    (EngineName.OPENVINO, Precision.INT8),
    (EngineName.ONNXRUNTIME, Precision.INT8),
)
"""The rule for "auto": the first pair that the bundle has, that is installed, and that this machine can run.

An artifact for a GPU counts where this process has a GPU of the kind that proved it, which the manifest names. The
order of those pairs is not measured. Of the others, bf16 on OpenVINO was the fastest sufficiently exact pair on every
CPU with bf16 instructions that was measured (docs/log.md). Without these, ONNX Runtime in fp32 is within a few percent
of OpenVINO and starts faster. int8 is only chosen if the caller names that precision; OpenVINO was 1.5 times as fast as
ONNX Runtime in int8.
"""

EXACT = frozenset({Precision.FP32, Precision.FP16, Precision.BF16})
"""What the precision "auto" may choose: the others change vectors so much that the caller has to decide."""

_EXTRAS = {EngineName.ONNXRUNTIME: "cpu", EngineName.OPENVINO: "openvino", EngineName.TENSORRT: "tensorrt"}
"""What brings an engine; ONNX Runtime for GPUs is in the extra gpu."""

PROVEN_ON = "gpu"
"""In an artifact's toolchain: the GPU that proved it."""

E = TypeVar("E", EngineName, Precision)


def choose(
    manifest: Manifest, engine: str, precision: str, *, elsewhere: bool = False
) -> tuple[EngineName, Precision, Artifact | None]:
    """Choose an engine, a precision and their packed artifact, which is None for the fake engine only.

    An `EngineError` means that a name is unknown, that the bundle has no such artifact, or (for "auto") that nothing
    fits this machine. With `elsewhere` another machine will run it, and finds out whether it can.
    """
    named_engine = None if engine == AUTO else _member(EngineName, engine, "engine")
    named_precision = None if precision == AUTO else _member(Precision, precision, "precision")
    if named_engine is EngineName.FAKE:
        return EngineName.FAKE, named_precision or Precision.FP32, None
    # If several artifacts share engine and precision, the first one wins: the int8 file for GPUs comes after the CPUs'.
    packed = {(a.engine, a.precision): a for a in reversed(manifest.artifacts) if a.layout is Layout.PACKED}
    allowed = EXACT if named_precision is None else {named_precision}
    matching = [
        key
        for key in (*PREFERENCE, *(key for key in packed if key not in PREFERENCE))
        if key in packed and named_engine in (None, key[0]) and key[1] in allowed
    ]
    proven = ", ".join(f"{e.value} {p.value}" for e, p in packed) or "none"
    if not matching:
        raise EngineError(
            f"the bundle has no packed artifact for engine {engine}, precision {precision}; it has {proven}. "
            "Choose one of these, or export it"
        )
    if elsewhere or (named_engine is not None and named_precision is not None):
        return (*matching[0], packed[matching[0]])  # both named: the engine itself raises if it cannot run
    obstacles = {}
    for key in matching:
        obstacles[key] = "" if named_engine in ON_GPU else _obstacle(packed[key], named=named_engine is not None)
        if not obstacles[key]:
            break
    for (name, runs_in), why in obstacles.items():
        if why and name in ON_GPU:
            _log.warning("%s %s of the bundle is passed over: %s", name.value, runs_in.value, why)
    if obstacles[key]:
        reasons = "; ".join(f"{name.value} {runs_in.value}: {why}" for (name, runs_in), why in obstacles.items())
        raise EngineError(f"nothing in the bundle runs here: {reasons}")
    return (*key, packed[key])


def _obstacle(artifact: Artifact, *, named: bool) -> str:
    """Return why an artifact cannot run here, or is not proven here; empty if nothing is known to stand in its way.

    A caller who has named its engine hears from that engine if it is not installed.
    """
    if not named and not installed(artifact.engine):
        return f"its engine is not installed, {install_command(_EXTRAS.get(artifact.engine, 'gpu'))}"
    if artifact.engine not in ON_GPU:
        lacking = artifact.precision is Precision.BF16 and not has_bf16()
        return "the CPU has no bf16 instructions" if lacking else ""
    try:
        gpu = str(this_gpu())
    except EngineError as error:
        return str(error)
    if (proven := artifact.toolchain.get(PROVEN_ON)) != gpu:
        return f"it was proven on {proven or 'an unnamed GPU'}, and this is {gpu}: prove it here, see to_tensorrt.py"
    try:
        here, built = version("tensorrt"), artifact.toolchain.get("tensorrt")
    except PackageNotFoundError:  # containers bring TensorRT without its metadata
        return ""
    if artifact.engine is EngineName.TENSORRT and built != here:
        return f"the plan is of TensorRT {built}, and {here} is installed: build it again with to_tensorrt.py"
    return ""


def _member(kind: type[E], value: str, what: str) -> E:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise EngineError(f"{what} {value!r} is unknown: it must be one of {AUTO}, {names}") from None
