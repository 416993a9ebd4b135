"""Choose the artifact of a bundle that runs here: the one that the caller names, or for "auto" by a documented rule."""

from __future__ import annotations

from typing import TypeVar

from mirror_runtime.bundle import Artifact, EngineName, Layout, Manifest, Precision
from mirror_runtime.engines import installed
from mirror_runtime.errors import EngineError, install_command
from mirror_runtime.host import has_bf16

AUTO = "auto"

PREFERENCE = (
    (EngineName.OPENVINO, Precision.BF16),
    (EngineName.ONNXRUNTIME, Precision.FP32),
    (EngineName.OPENVINO, Precision.FP32),
    (EngineName.OPENVINO, Precision.INT8),
    (EngineName.ONNXRUNTIME, Precision.INT8),
)
"""The rule for "auto": the first pair that the bundle has, that is installed, and that this CPU can run.

bf16 on OpenVINO was the fastest sufficiently exact pair on every CPU with bf16 instructions that was measured
(docs/log.md). Without these, ONNX Runtime in fp32 is within a few percent of OpenVINO and starts faster. int8 is only
chosen if the caller names that precision; OpenVINO was 1.5 times as fast as ONNX Runtime in int8.
"""

EXACT = frozenset({Precision.FP32, Precision.BF16})
"""What the precision "auto" may choose: the others change vectors so much that the caller has to decide."""

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
    for key in matching:
        if (named_engine is key[0] or installed(key[0])) and (key[1] is not Precision.BF16 or has_bf16()):
            return (*key, packed[key])
    raise EngineError(
        f"nothing in the bundle runs here: it has {proven}; {install_command('openvino')} (or the extra cpu)"
    )


def _member(kind: type[E], value: str, what: str) -> E:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise EngineError(f"{what} {value!r} is unknown: it must be one of {AUTO}, {names}") from None
