"""Which of a bundle's artifacts runs here: what the caller asked for, or a fixed and documented rule for "auto"."""

from __future__ import annotations

from typing import TypeVar

from mirror_runtime.bundle import Artifact, EngineName, Layout, Manifest, Precision
from mirror_runtime.engines import installed
from mirror_runtime.errors import EngineError
from mirror_runtime.host import has_bf16

AUTO = "auto"

PREFERENCE = (
    (EngineName.OPENVINO, Precision.BF16),
    (EngineName.ONNXRUNTIME, Precision.FP32),
    (EngineName.OPENVINO, Precision.FP32),
    (EngineName.OPENVINO, Precision.INT8),
    (EngineName.ONNXRUNTIME, Precision.INT8),
)
"""The rule for "auto": the first that the bundle proves, that is installed, and that this CPU can run.

bf16 on OpenVINO was the fastest exact-enough way on every CPU with bf16 instructions that was measured (docs/log.md);
without them ONNX Runtime in fp32 is within a few percent of OpenVINO and starts faster. int8 counts only where the
precision is asked for; OpenVINO was half again as fast at it as ONNX Runtime.
"""

EXACT = frozenset({Precision.FP32, Precision.BF16})
"""What the precision "auto" may mean: the others change vectors enough to be a decision of the caller's."""

E = TypeVar("E", EngineName, Precision)


def choose(manifest: Manifest, engine: str, precision: str) -> tuple[EngineName, Precision, Artifact | None]:
    """Pick the engine, the precision and the packed artifact that proves them.

    Args:
        manifest: the bundle's.
        engine: an engine's name or "auto".
        precision: a precision's name or "auto".

    Returns:
        The choice; the artifact is None for the fake engine alone.

    Raises:
        EngineError: a name is unknown, the bundle has no such artifact, or (for "auto") nothing fits this machine.
    """
    wanted_engine = None if engine == AUTO else _member(EngineName, engine, "engine")
    wanted_precision = None if precision == AUTO else _member(Precision, precision, "precision")
    if wanted_engine is EngineName.FAKE:
        return EngineName.FAKE, wanted_precision or Precision.FP32, None
    # The first of several: an int8 file for GPUs stands behind the one for CPUs.
    packed = {(a.engine, a.precision): a for a in reversed(manifest.artifacts) if a.layout is Layout.PACKED}
    allowed = EXACT if wanted_precision is None else {wanted_precision}
    matching = [
        key
        for key in (*PREFERENCE, *(key for key in packed if key not in PREFERENCE))
        if key in packed and wanted_engine in (None, key[0]) and key[1] in allowed
    ]
    proven = ", ".join(f"{e.value} {p.value}" for e, p in packed) or "none"
    if not matching:
        raise EngineError(
            f"the bundle has no packed artifact for engine {engine}, precision {precision}; it has {proven}. "
            "Ask for one of these or export it"
        )
    if wanted_engine is not None and wanted_precision is not None:
        name, asked = matching[0]  # asked for in full: the engine itself says if it cannot
        return name, asked, packed[name, asked]
    for name, asked in matching:
        if (wanted_engine is name or installed(name)) and (asked is not Precision.BF16 or has_bf16()):
            return name, asked, packed[name, asked]
    raise EngineError(
        f"nothing in the bundle runs here: it has {proven}; "
        "pip install 'mirror-runtime[openvino]' or 'mirror-runtime[cpu]'"
    )


def _member(kind: type[E], value: str, what: str) -> E:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise EngineError(f"{what} {value!r} is unknown: choose {AUTO}, {names}") from None
