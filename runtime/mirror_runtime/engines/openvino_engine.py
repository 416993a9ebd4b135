"""OpenVINO on the CPU: one compiled model per static shape, several infer requests each."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import ONE_TOKEN, EngineName, Pooling, Precision
from mirror_runtime.engines.openvino_core import read_graph, shared_core
from mirror_runtime.errors import EngineError
from mirror_runtime.extras import require
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import BLOCK, PackedRows

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Compilations of a shape before disagreeing streams are an error. Seen three times in some hundred starts, on a busy
machine (2026.4.1): one stream of a model computed different vectors for every text."""

_ROUNDS = 3
"""Maximum comparison rounds. On a busy machine one stream may run both requests, so one round can miss the other
stream."""

_APART, _LONG = 1.5, 0.02
"""A round is conclusive if every stream took over `_LONG` seconds and none took `_APART` times as long as another: a
stream that runs two requests takes twice as long. Threads that start late blur shorter rounds."""

_ONE_TOKEN_MULTIPLE = 64
"""The length multiple of graphs whose last layer computes one token per text, in its slot. With the 12 slots of 48
tokens, OpenVINO (2026.4.1) computes wrong vectors: in bf16 always, in fp32 with many rows. 4, 8 and multiples of 16
slots are right."""

_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16", Precision.INT8: "bf16"}
"""The precision of whatever is not quantised; int8 graphs use f32 on a CPU without bf16."""

_FIRST_TENSORS = threading.Lock()
"""Held while a process creates its first tensor. If two threads do so at once, they deadlock: one waits for Python's
lock, the other for the guard of a static table of types (2026.4.1). Later tensors only read the table."""


@dataclass(frozen=True)
class _Slot:
    """An infer request with numpy views of its input and output memory, which stays in place for a static shape."""

    request: Any
    inputs: Mapping[str, NDArray[np.int64]]
    output: NDArray[np.float32]

    @classmethod
    def of(cls, request: Any, names: Sequence[str]) -> _Slot:
        inputs = {name: request.get_input_tensor(i).data for i, name in enumerate(names)}
        return cls(request=request, inputs=inputs, output=request.get_output_tensor(0).data)

    def fill(self, rows: PackedRows) -> None:
        """Copy rows to the inputs."""
        for name, view in self.inputs.items():
            view[...] = getattr(rows, name)

    def run(self) -> None:
        """Run the request and wait for it."""
        try:
            # `infer` would create tensor objects at each call; these views are created once.
            self.request.start_async()
            self.request.wait()
        except RuntimeError as error:
            shape = next(view.shape for view in self.inputs.values())
            raise EngineError(f"openvino failed on rows {shape}: {error}") from error


class OpenVinoEngine:
    """Runs packed graphs on OpenVINO's CPU plugin: in fp32, lowered to bf16 by the plugin, or in int8.

    The quantised products of an int8 file run in int8, the rest in bf16 if the CPU has it, else in fp32.

    A shape is compiled when it first occurs: a batch of many rows for throughput, with `streams` streams (by default
    one a core) that share the cores; a single row for latency, with all cores on one stream. All streams run the first
    batch of a shape, and their vectors must agree.
    """

    def __init__(
        self,
        graph: Path,
        precision: Precision,
        streams: int | None,
        cache: Path | None = None,
        before_reading: Callable[[], None] = lambda: None,
        *,
        length_multiple: int = BLOCK,
    ) -> None:
        openvino = require("openvino", "openvino")
        self._core = shared_core()
        with _FIRST_TENSORS:
            _ = openvino.Tensor(np.zeros(1, np.int64)).data
        self._hint = _hint(self._core, precision)
        self.name = EngineName.OPENVINO
        self.precision = precision
        self._cores = usable_cores()
        self.streams = streams or self._cores
        self.length_multiple = length_multiple
        self.dynamic_shapes = True
        self._graph = graph
        self._slots: dict[tuple[int, int], SimpleQueue[_Slot]] = {}
        self._compiling: dict[tuple[int, int], threading.Lock] = {}
        try:
            self._model = read_graph(graph, cache, before_reading)
        except RuntimeError as error:
            raise EngineError(f"openvino cannot load {graph.name}: {error}") from error
        _check_quantization(self._model, graph, precision)
        self._inputs = [tensor.get_any_name() for tensor in self._model.inputs]

    def run(self, rows: PackedRows) -> NDArray[np.float32]:
        """Compute [R, L // 4, width] of the graph's vector type; see `Engine.run`."""
        if rows.shape not in self._slots and (first := self._compile(rows)) is not None:
            return first
        pool = self._slots[rows.shape]
        slot = pool.get()
        try:
            slot.fill(rows)
            slot.run()
            return slot.output.copy()
        finally:
            pool.put(slot)

    def close(self) -> None:
        """Release the compiled models."""
        self._slots.clear()
        del self._model

    def _compile(self, rows: PackedRows) -> NDArray[np.float32] | None:
        """Compile the shape of some rows once; threads compile different shapes in parallel.

        Return the rows' vectors if the streams had to run them to be compared; else None.
        """
        shape = rows.shape
        with self._compiling.setdefault(shape, threading.Lock()):
            if shape in self._slots:
                return None
            compared = self.streams > 1 and shape[0] > 1  # single rows have one stream
            slots = self._agreeing_slots(rows) if compared else self._compiled_slots(shape)
            vectors = slots[0].output.copy() if compared else None
            pool: SimpleQueue[_Slot] = SimpleQueue()
            for slot in slots:
                pool.put(slot)
            self._slots[shape] = pool
            return vectors

    def _agreeing_slots(self, rows: PackedRows) -> list[_Slot]:
        """Compile the shape of some rows until all streams compute the same vectors for them."""
        for _ in range(_ATTEMPTS):
            slots = self._compiled_slots(rows.shape)
            if _agree(slots, rows):
                return slots
            _log.warning("openvino's streams disagree on rows %s: compiling %s again", rows.shape, self._graph.name)
        raise EngineError(
            f"openvino's streams computed different vectors for one batch, {_ATTEMPTS} times in a row: run "
            f"{self._graph.name} with streams=1, or with onnxruntime"
        )

    def _compiled_slots(self, shape: tuple[int, int]) -> list[_Slot]:
        alone = shape[0] == 1
        streams = 1 if alone else self.streams
        settings = {
            "INFERENCE_PRECISION_HINT": self._hint,
            "PERFORMANCE_HINT": "LATENCY" if alone else "THROUGHPUT",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": max(self._cores, streams),
        }
        try:
            model = self._model.clone()
            model.reshape({name: list(shape) for name in self._inputs})
            compiled = self._core.compile_model(model, "CPU", settings)
            ran = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        except RuntimeError as error:
            raise EngineError(f"openvino cannot compile {self._graph.name} for rows {shape}: {error}") from error
        if ran.lower().replace("bfloat16", "bf16").replace("float32", "f32") != self._hint:
            raise EngineError(f"openvino compiled {self._graph.name} for {ran}, not for {self.precision.value}")
        return [_Slot.of(compiled.create_infer_request(), self._inputs) for _ in range(self.streams)]


def _agree(slots: Sequence[_Slot], rows: PackedRows) -> bool:
    """Run the same rows on all streams at once, until each has, and return whether their vectors are bit-identical."""
    for slot in slots:
        slot.fill(rows)

    def seconds_of(slot: _Slot) -> float:
        slot.run()
        return time.perf_counter() - started

    with ThreadPoolExecutor(len(slots)) as threads:
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            seconds = list(threads.map(seconds_of, slots))
            if not all(np.array_equal(slot.output, slots[0].output, equal_nan=True) for slot in slots):
                return False
            if min(seconds) > _LONG and max(seconds) < _APART * min(seconds):
                break
    return True


def length_multiple_of(pooling: Pooling) -> int:
    """Return the length multiple with which OpenVINO computes a pooling correctly."""
    return _ONE_TOKEN_MULTIPLE if pooling in ONE_TOKEN else BLOCK


def compile_padded(graph: Path, precision: Precision) -> Any:
    """Compile a padded graph (ONNX or `.xml`) with free dimensions, for a proof. Serving runs packed graphs."""
    core = shared_core()
    settings = {"INFERENCE_PRECISION_HINT": _hint(core, precision), "INFERENCE_NUM_THREADS": usable_cores()}
    try:
        model = core.read_model(graph)
        _check_quantization(model, graph, precision)
        return core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise EngineError(f"openvino cannot load {graph.name}: {error}") from error


def _hint(core: Any, precision: Precision) -> str:
    """Return the precision of whatever is not quantised."""
    if precision not in _HINTS:
        raise EngineError(f"openvino runs graphs in fp32, bf16 or int8, not {precision.value}")
    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision is Precision.BF16 and not bf16:
        raise EngineError("this CPU has no bf16 (avx512_bf16 or amx_bf16): request fp32")
    return _HINTS[precision] if bf16 else "f32"


def _check_quantization(model: Any, graph: Path, precision: Precision) -> None:
    """Check that a quantised graph runs in int8, and no other does."""
    quantized = any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
    if quantized != (precision is Precision.INT8):
        held = "int8" if quantized else "floating point"
        raise EngineError(f"{graph.name} is a graph in {held}: it cannot run in {precision.value}")
