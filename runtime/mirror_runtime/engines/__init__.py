"""Engines by name. Each module imports its library when an engine is loaded, not before."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from mirror_runtime.bundle import EncoderSpec, EngineName, Precision
from mirror_runtime.engines.base import Engine
from mirror_runtime.errors import EngineError

__all__ = ["ON_GPU", "Engine", "installed", "load_engine"]

_LIBRARIES = {EngineName.ONNXRUNTIME: "onnxruntime", EngineName.OPENVINO: "openvino", EngineName.TENSORRT: "tensorrt"}
_GPU_PROVIDERS = (EngineName.ONNXRUNTIME_CUDA, EngineName.ONNXRUNTIME_TENSORRT)

ON_GPU = frozenset({EngineName.TENSORRT, *_GPU_PROVIDERS})
"""The engines that need an NVIDIA GPU."""


def installed(name: EngineName) -> bool:
    """Return whether an engine's library is installed, without importing it."""
    if name in _GPU_PROVIDERS:  # onnxruntime-gpu has the same import name as onnxruntime
        return any(distributions(name="onnxruntime-gpu"))
    return name is EngineName.FAKE or find_spec(_LIBRARIES[name]) is not None


def load_engine(
    name: EngineName,
    precision: Precision,
    graph: Path,
    *,
    streams: int | None = None,
    spec: EncoderSpec,
    cache: Path | None = None,
    before_reading: Callable[[], None] = lambda: None,
) -> Engine:
    """Load a packed graph (an ONNX file or TensorRT plan) into an engine, in this precision and never in another.

    Without `streams` the engine chooses them from this process's cores. OpenVINO needs the spec's pooling, the fake
    engine its vector type. `cache` is a folder for what the engine makes of this graph, to start faster next time.
    `before_reading` checks the graph's file; it is not called if the engine reads its own copy from the cache instead.

    Raises:
        MissingExtra: the engine's library is not installed.
        EngineError: the engine cannot run this graph in this precision here.
    """
    if streams is not None and streams < 1:
        raise EngineError(f"streams is {streams}: it must be at least 1")
    if (spec.scores_pairs or spec.per_token) and name in ON_GPU:
        raise EngineError(f"pooling {spec.pooling.value} is proven on CPUs only: choose onnxruntime or openvino")
    if name is EngineName.OPENVINO:
        from mirror_runtime.engines.openvino_engine import OpenVinoEngine, length_multiple_of

        multiple = length_multiple_of(spec.pooling)
        return OpenVinoEngine(graph, precision, streams, cache, before_reading, length_multiple=multiple)
    before_reading()
    if name is EngineName.ONNXRUNTIME:
        from mirror_runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, precision, streams)
    if name is EngineName.TENSORRT:
        from mirror_runtime.engines.tensorrt_engine import TensorRtEngine

        return TensorRtEngine(graph, precision, streams)
    if name in _GPU_PROVIDERS:
        from mirror_runtime.engines.onnxruntime_gpu import OnnxRuntimeGpuEngine

        return OnnxRuntimeGpuEngine(name, graph, precision, streams, cache)
    if name is EngineName.FAKE:
        from mirror_runtime.engines.fake import FakeEngine

        return FakeEngine(precision, streams, spec)
    raise EngineError(f"engine {name.value} has no implementation here")
