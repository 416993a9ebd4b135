"""An engine that calls another model of the same Triton server from inside `embed` (business logic scripting, BLS)."""

from __future__ import annotations

from typing import Any

import numpy as np

from mirror_runtime.bundle import Artifact
from mirror_runtime.errors import EngineError
from mirror_runtime.packing import BLOCK, PackedRows
from mirror_runtime.triton.model.backend_model import ENCODER_NAME
from mirror_runtime.vectors import Vectors


class BlsEngine:
    """Runs packed rows on the model `encoder`. Safe to call from several threads.

    The `version` of the other model is that of `embed`, so that tokenizer and graph are replaced together.
    """

    def __init__(self, pb_utils: Any, artifact: Artifact, streams: int, version: int) -> None:
        self._pb_utils = pb_utils
        self.name = artifact.engine
        self.precision = artifact.precision
        self.streams = streams
        self.length_multiple = BLOCK
        self.dynamic_shapes = False
        self._inputs = [(tensor.name, np.dtype(tensor.dtype)) for tensor in artifact.inputs]
        self._output = artifact.outputs[0].name
        self._version = version

    def run(self, rows: PackedRows) -> Vectors:
        """Compute [R, L // 4, width]; see `Engine.run`."""
        tensors = [
            self._pb_utils.Tensor(name, getattr(rows, name).astype(kind, copy=False)) for name, kind in self._inputs
        ]
        response = self._pb_utils.InferenceRequest(
            model_name=ENCODER_NAME,
            model_version=self._version,
            requested_output_names=[self._output],
            inputs=tensors,
            preferred_memory=self._pb_utils.PreferredMemory(self._pb_utils.TRITONSERVER_MEMORY_CPU),
        ).exec()
        if response.has_error():
            reason = response.error().message()
            raise EngineError(f"the model {ENCODER_NAME} failed on rows {rows.shape}: {reason}")
        output: Vectors = self._pb_utils.get_output_tensor_by_name(response, self._output).as_numpy()
        return np.array(output)  # the response owns its memory

    def close(self) -> None:
        """Do nothing: the server owns the other model."""
