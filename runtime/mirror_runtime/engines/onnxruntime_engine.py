"""ONNX Runtime on the CPU: one session with free dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError
from mirror_runtime.extras import require
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import PackedRows


class OnnxRuntimeEngine:
    """Runs fp32 packed graphs on ONNX Runtime's CPU provider.

    Args:
        graph: the packed ONNX file.
        precision: fp32; ONNX Runtime runs what the file holds.
        streams: batches in flight; None means one that uses every core.

    Raises:
        MissingExtra: onnxruntime is not installed.
        EngineError: another precision was asked for, or the file cannot be loaded.
    """

    def __init__(self, graph: Path, precision: Precision, streams: int | None) -> None:
        if precision is not Precision.FP32:
            raise EngineError(f"onnxruntime runs fp32 packed graphs, not {precision.value}: choose fp32 or openvino")
        self.name = EngineName.ONNXRUNTIME
        self.precision: Precision = precision
        self.streams = streams or 1
        self._session = open_session(graph, threads=max(1, usable_cores() // self.streams))

    def run(self, rows: PackedRows) -> NDArray[np.float32]:
        """Compute float32 [R, L // 4, dim]; see `Engine.run`."""
        feed = {
            "input_ids": rows.input_ids,
            "position_ids": rows.position_ids,
            "segment_ids": rows.segment_ids,
        }
        try:
            (out,) = self._session.run(["embedding"], feed)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise EngineError(f"onnxruntime failed on rows {rows.shape}: {error}") from error
        result: NDArray[np.float32] = out
        return result

    def close(self) -> None:
        """Release the session."""
        del self._session


def open_session(graph: Path, *, threads: int) -> Any:
    """Open an ONNX file the way this runtime serves it; the exporter proves its graphs with the same options.

    Args:
        graph: any ONNX file.
        threads: threads within one call.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        MissingExtra: onnxruntime is not installed.
        EngineError: the file cannot be loaded.
    """
    onnxruntime = require("onnxruntime", "cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin between calls take the cores from the tokenizer and from other sessions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise EngineError(f"onnxruntime cannot load {graph.name}: {error}") from error
