"""Engines by name. Each file imports its library when an engine is made, never before."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.engines.base import Engine
from mirror_runtime.errors import EngineError

__all__ = ["Engine", "installed", "load_engine"]

_LIBRARIES = {EngineName.ONNXRUNTIME: "onnxruntime", EngineName.OPENVINO: "openvino", EngineName.TENSORRT: "tensorrt"}


def installed(name: EngineName) -> bool:
    """Tell whether an engine's library can be found, without importing it."""
    return name is EngineName.FAKE or find_spec(_LIBRARIES[name]) is not None


def load_engine(name: EngineName, precision: Precision, graph: Path, *, streams: int | None = None, dim: int) -> Engine:
    """Load a packed graph into an engine.

    Args:
        name: which engine.
        precision: what it must run in; an engine that cannot raises instead of choosing another.
        graph: the ONNX file; the fake engine needs none and ignores it.
        streams: batches in flight; None lets the engine choose from this process's cores.
        dim: length of a vector, which only the fake engine cannot read from the graph.

    Raises:
        MissingExtra: the engine's library is not installed.
        EngineError: the engine cannot run this graph in this precision here.
    """
    if streams is not None and streams < 1:
        raise EngineError(f"streams is {streams}: it must be at least 1")
    if name is EngineName.OPENVINO:
        from mirror_runtime.engines.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(graph, precision, streams)
    if name is EngineName.ONNXRUNTIME:
        from mirror_runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, precision, streams)
    if name is EngineName.FAKE:
        from mirror_runtime.engines.fake import FakeEngine

        return FakeEngine(precision, streams, dim)
    raise EngineError(f"engine {name.value} does not run packed graphs yet: choose onnxruntime or openvino")
