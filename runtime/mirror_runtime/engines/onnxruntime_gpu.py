"""ONNX Runtime on an NVIDIA GPU, with its CUDA or TensorRT provider: a session and a CUDA graph per packed shape."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError, one_line
from mirror_runtime.extras import require
from mirror_runtime.packing import BLOCK, PackedRows
from mirror_runtime.vectors import Vectors

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}

Shape = tuple[int, int]

INPUTS = ("input_ids", "position_ids", "segment_ids")
OUTPUT = "embedding"

TENSORRT_MAJOR = 10
"""The published onnxruntime-gpu wheels (1.31) link their TensorRT provider with libnvinfer.so.10. They cannot use an
installed TensorRT 11, which only builds from source link."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """The settings of one of ONNX Runtime's GPU providers."""

    name: str  # ONNX Runtime's name
    device: str  # ONNX Runtime's name for the device of its arrays
    options: Callable[[Shape, Precision, Path, Path | None], Mapping[str, str]]
    static: bool  # the session fixes the shape, so that no shapes are computed on the CPU, as TensorRT's profile does
    cure: str  # what to check if the provider cannot be loaded


def cuda_options(shape: Shape, precision: Precision, graph: Path, cache: Path | None) -> Mapping[str, str]:
    """Return the CUDA provider's options: captured as a CUDA graph, and fp32 without TF32."""
    return {"device_id": "0", "enable_cuda_graph": "1", "use_tf32": "0"}


def tensorrt_options(shape: Shape, precision: Precision, graph: Path, cache: Path | None) -> Mapping[str, str]:
    """Return the TensorRT provider's options: one static profile, a CUDA graph, and the engine kept in `cache`.

    The provider builds engines of several profiles but only runs the first (microsoft/onnxruntime pull request 31624),
    hence a session for each shape. It also builds weakly typed networks, which use the graph's fp16 only if an option
    allows it; the certificate measures the result.
    """
    shapes = ",".join(f"{name}:{shape[0]}x{shape[1]}" for name in INPUTS)
    options = {
        "device_id": "0",
        "trt_profile_min_shapes": shapes,
        "trt_profile_opt_shapes": shapes,
        "trt_profile_max_shapes": shapes,
        "trt_cuda_graph_enable": "1",
        "trt_layer_norm_fp32_fallback": "1",
    }
    allowed = {Precision.FP16: "trt_fp16_enable", Precision.BF16: "trt_bf16_enable", Precision.INT8: "trt_int8_enable"}
    if precision in allowed:
        options[allowed[precision]] = "1"
    if cache is not None:
        folder = str(cache / "onnxruntime-tensorrt")
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_engine_cache_prefix": f"{graph.stem}-{shape[0]}x{shape[1]}",
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
    return options


PROVIDERS = {
    EngineName.ONNXRUNTIME_CUDA: Provider(
        name="CUDAExecutionProvider",
        device="cuda",
        options=cuda_options,
        static=True,
        cure="pip uninstall -y onnxruntime, then install the extra gpu, which brings CUDA 13 and cuDNN",
    ),
    EngineName.ONNXRUNTIME_TENSORRT: Provider(
        name="TensorrtExecutionProvider",
        device="cuda",
        options=tensorrt_options,
        static=False,
        cure=f"it needs TensorRT {TENSORRT_MAJOR} on the library path (pip install 'tensorrt<{TENSORRT_MAJOR + 1}'); "
        "with TensorRT 11 use engine tensorrt",
    ),
}


@dataclass(frozen=True)
class _Bound:
    """A session for one shape, with its arrays at fixed addresses on the GPU."""

    session: Any
    binding: Any
    inputs: Mapping[str, Any]
    output: Any


class OnnxRuntimeGpuEngine:
    """Runs packed graphs on a GPU through ONNX Runtime. A shape is prepared when it first occurs.

    Each shape's session has its own copy of the weights on the GPU: 13 shapes of a 45 MB fp16 graph take 600 MB.
    The GPU runs the batches in flight one at a time. `cache` is a folder for the engines that TensorRT builds; None
    builds them again in every process.
    """

    def __init__(
        self, name: EngineName, graph: Path, precision: Precision, streams: int | None, cache: Path | None
    ) -> None:
        self._onnxruntime = require("onnxruntime", "gpu")
        self._provider = PROVIDERS[name]
        if precision is Precision.FP8:
            raise EngineError(f"{name.value} does not run fp8 graphs: choose engine tensorrt")
        present = self._onnxruntime.get_available_providers()
        if self._provider.name not in present:
            raise EngineError(
                f"the installed onnxruntime has no {self._provider.name} (it has {', '.join(present)}): "
                f"{self._provider.cure}"
            )
        # CUDA and cuDNN from NVIDIA's packages, which no search path has. Vendors' builds do without the function.
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            getattr(self._onnxruntime, "preload_dlls", lambda: None)()
        self.name = name
        self.precision: Precision = precision
        self.streams = streams or 1
        self.length_multiple = BLOCK
        self.dynamic_shapes = False
        self._graph = graph
        self._cache = cache
        self._bound: dict[Shape, _Bound] = {}
        # During a capture other threads must not allocate, and a captured graph cannot run twice at once.
        self._turn = threading.Lock()

    def run(self, rows: PackedRows) -> Vectors:
        """Compute [R, L // 4, width]; see `Engine.run`."""
        with self._turn:
            bound = self._bound.get(rows.shape)
            if bound is None:
                bound = self._bound[rows.shape] = self._bind(rows)
            try:
                for name, value in bound.inputs.items():
                    value.update_inplace(np.ascontiguousarray(getattr(rows, name)))
                bound.binding.synchronize_inputs()
                bound.session.run_with_iobinding(bound.binding)
                bound.binding.synchronize_outputs()
                # On the CPU, `numpy` returns a view of memory that the next call overwrites.
                result: Vectors = np.array(bound.output.numpy())
            except Exception as error:  # onnxruntime's exceptions share no base class of their own
                raise EngineError(f"{self.name.value} failed on rows {rows.shape}: {error}") from error
            return result

    def close(self) -> None:
        """Release the sessions and their memory."""
        self._bound.clear()

    def _bind(self, rows: PackedRows) -> _Bound:
        session = self._open(rows.shape)
        ort, device = self._onnxruntime, self._provider.device
        (described,) = session.get_outputs()
        count, length = rows.shape
        dim = described.shape[-1]
        if not isinstance(dim, int):
            raise EngineError(f"{self._graph.name} has vectors of unknown length: export it again")
        shape = [count, *(described.shape[1:-1] if self._provider.static else [length // 4]), dim]
        dtype = _DTYPES[described.type]
        binding = session.io_binding()
        inputs = {}
        for name in INPUTS:
            inputs[name] = ort.OrtValue.ortvalue_from_numpy(getattr(rows, name), device, 0)
            binding.bind_ortvalue_input(name, inputs[name])
        output = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0)
        binding.bind_ortvalue_output(OUTPUT, output)
        return _Bound(session=session, binding=binding, inputs=inputs, output=output)

    def _open(self, shape: Shape) -> Any:
        ort, provider = self._onnxruntime, self._provider
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # A graph that runs partly on the CPU cannot be captured, and is not what the caller requested.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if provider.device == "cpu" else "1")
        if provider.static:
            options.add_free_dimension_override_by_name("rows", shape[0])
            options.add_free_dimension_override_by_name("length", shape[1])
        settings = dict(provider.options(shape, self.precision, self._graph, self._cache))
        try:
            # Without its libraries ONNX Runtime prints which one it misses, tries the CPU and names that as the error.
            with contextlib.redirect_stdout(sys.stderr):
                session = ort.InferenceSession(str(self._graph), options, providers=[(provider.name, settings)])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise EngineError(
                f"{self.name.value} cannot load {self._graph.name} for rows {shape}: {one_line(error)} If a library is "
                f"missing (ONNX Runtime's message above names it): {provider.cure}"
            ) from error
        running = session.get_providers()
        if running[0] != provider.name:
            # If a provider fails to load, ONNX Runtime only warns and continues with the next.
            raise EngineError(
                f"{provider.name} could not be loaded ({', '.join(running)} would run instead): {provider.cure}"
            )
        return session
