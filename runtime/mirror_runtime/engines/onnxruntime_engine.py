"""ONNX Runtime on the CPU: one session with free dimensions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError
from mirror_runtime.extras import require
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import BLOCK, PackedRows

PRECISION_KEY = "mirror_precision"
"""Metadata key of an ONNX file for the precision of its matrix products; fp32 if absent."""


class OnnxRuntimeEngine:
    """Runs packed graphs on ONNX Runtime's CPU provider, in the precision of the file.

    Int8 products run in int8. fp16 and fp8 files are computed in fp32 between their roundings, which suffices to prove
    a file but is slower than fp32. There are no kernels for bf16.
    """

    def __init__(self, graph: Path, precision: Precision, streams: int | None) -> None:
        if precision is Precision.BF16:
            raise EngineError("onnxruntime has no bf16 kernels on the CPU: choose openvino or another precision")
        self.name = EngineName.ONNXRUNTIME
        self.precision: Precision = precision
        self.streams = streams or 1
        self.length_multiple = BLOCK
        self.dynamic_shapes = True
        threads = max(1, usable_cores() // self.streams)
        self._session = open_session(graph, threads=threads, fused=precision is not Precision.FP8)
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        held = self._session.get_modelmeta().custom_metadata_map.get(PRECISION_KEY, Precision.FP32.value)
        if held != precision.value:
            raise EngineError(f"{graph.name} is a graph in {held}, not {precision.value}: request {held}")

    def run(self, rows: PackedRows) -> NDArray[np.float32]:
        """Compute [R, L // 4, width] of the graph's vector type; see `Engine.run`."""
        try:
            (out,) = self._session.run(["embedding"], {name: getattr(rows, name) for name in self._inputs})
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise EngineError(f"onnxruntime failed on rows {rows.shape}: {error}") from error
        result: NDArray[np.float32] = out
        return result

    def close(self) -> None:
        """Release the session."""
        del self._session


def open_session(graph: Path, *, threads: int, fused: bool = True) -> Any:
    """Open an ONNX file with the options of this runtime; export proves its graphs with the same ones.

    `threads` work within one call. `fused` operators, with the roundings around them, do not support fp8.
    """
    # Its telemetry sends data about the machine and, in a forked child that ends, waits for ever for a thread (1.31).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    onnxruntime = require("onnxruntime", "cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin between calls would take cores from the tokenizer and from other sessions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise EngineError(f"onnxruntime cannot load {graph.name}: {error}") from error
