"""TensorRT: a plan, one execution context and one CUDA graph for each packed shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from numpy.typing import NDArray

from mirror_runtime.bundle import EngineName, Layout, Precision
from mirror_runtime.engines.cuda_device import Buffer, CudaDevice
from mirror_runtime.engines.plan_card import PlanCard, check_card, read_card
from mirror_runtime.errors import EngineError
from mirror_runtime.extras import require
from mirror_runtime.packing import BLOCK, PackedRows
from mirror_runtime.vectors import Vectors

STREAMS = 2
"""Default of batches in flight: while one is computed, the other's arrays are packed and copied."""

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class _Ready:
    """A context set to one profile and shape, its memory, and its CUDA graph; None for a dynamic profile."""

    context: Any
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]
    graph: Any | None


@dataclass
class _Lane:
    """The resources of one batch in flight: a stream, scratch memory, and a context for each shape so far."""

    stream: Any
    scratch: int
    ready: dict[tuple[tuple[str, tuple[int, ...]], ...], _Ready] = field(default_factory=dict)


class LoadedPlan:
    """A deserialised plan, with its card beside it, that runs named arrays. Safe to call from several threads.

    A shape of a static profile (min = max) is prepared once and repeated as a CUDA graph, copies included; any other
    shape is prepared at each call. `streams` calls run at once.
    """

    def __init__(self, plan: Path, streams: int) -> None:
        self.card: PlanCard = read_card(plan)
        self._trt = require("tensorrt", "tensorrt")
        self._cuda = CudaDevice()
        check_card(
            self.card,
            tensorrt=self._trt.__version__,
            gpu=self._cuda.name,
            compute_capability=self._cuda.compute_capability,
        )
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
        if self.card.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such plans bring their own loader
        try:
            self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        except OSError as error:
            raise EngineError(f"{plan.name} cannot be read: {error.strerror}") from error
        if self._engine is None:
            raise EngineError(f"TensorRT cannot load {plan.name}, which may be truncated: copy or build it again")
        # Contexts of one lane never run at once, so they share scratch memory that is large enough for every profile.
        self._scratch_bytes = max(1, int(self._engine.device_memory_size_v2))
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        self._all_lanes = [
            _Lane(stream=self._cuda.stream(), scratch=self._cuda.allocate(self._scratch_bytes)) for _ in range(streams)
        ]
        for lane in self._all_lanes:
            self._lanes.put(lane)

    def run(self, feed: Arrays) -> dict[str, NDArray[Any]]:
        """Compute every output from each input's array."""
        shapes = {name: array.shape for name, array in feed.items()}
        index = self._profile(shapes)
        lane = self._lanes.get()
        try:
            key = tuple(shapes.items())
            ready = lane.ready.get(key)
            if ready is None:
                ready = self._prepare(lane, index, shapes)
                if ready.graph is not None:
                    lane.ready[key] = ready
            for name, buffer in ready.inputs.items():
                buffer.host[...] = feed[name]
            if ready.graph is not None:
                self._cuda.launch(ready.graph, lane.stream)
            else:
                self._queue(lane, ready)
            self._cuda.wait(lane.stream)
            result = {name: buffer.host.copy() for name, buffer in ready.outputs.items()}
            if ready.graph is None:
                self._release(ready)
            return result
        finally:
            self._lanes.put(lane)

    def close(self) -> None:
        """Release graphs, memory and streams, and then the engine."""
        for lane in self._all_lanes:
            for ready in lane.ready.values():
                self._release(ready)
            lane.ready.clear()
            self._cuda.free(addresses=[lane.scratch], buffers=[], graphs=[], streams=[lane.stream])
        self._all_lanes.clear()
        del self._engine, self._runtime

    def _profile(self, shapes: Shapes) -> int:
        """Find the smallest profile that has the shapes."""
        fitting = [
            (sum(max(profile[name][2]) for name in shapes), index)
            for index, profile in enumerate(self.card.profiles)
            if all(
                all(a <= x <= b for a, x, b in zip(profile[name][0], shape, profile[name][2], strict=True))
                for name, shape in shapes.items()
            )
        ]
        if not fitting:
            built = ", ".join("x".join(map(str, next(iter(p.values()))[2])) for p in self.card.profiles)
            raise EngineError(
                f"the plan has no profile for {next(iter(shapes.values()))}; it was built for up to {built}: "
                "build it again, or run with the default row length and batch size"
            )
        return min(fitting)[1]

    def _prepare(self, lane: _Lane, index: int, shapes: Shapes) -> _Ready:
        """Set up a context for one shape, run it once, and record the run if its profile is static."""
        trt, engine = self._trt, self._engine
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError("TensorRT cannot make an execution context: the GPU's memory may be full")
        context.set_device_memory(lane.scratch, self._scratch_bytes)
        handle = int(lane.stream)
        if not context.set_optimization_profile_async(index, handle):
            raise EngineError(f"TensorRT refuses its own profile {index}")
        self._cuda.wait(lane.stream)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT refuses shape {shape} of {name} in profile {index}")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs: dict[str, Buffer] = {}
        outputs: dict[str, Buffer] = {}
        for name in names:
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            buffer = self._cuda.buffer(shape, trt.nptype(engine.get_tensor_dtype(name)))
            buffer.host[...] = 0  # the first run must read valid ids
            side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
            side[name] = buffer
            if not context.set_tensor_address(name, buffer.device):
                raise EngineError(f"TensorRT refuses memory for {name}")
        ready = _Ready(context=context, inputs=inputs, outputs=outputs, graph=None)
        if any(least != most for least, _, most in self.card.profiles[index].values()):
            return ready
        # The first run after a change of shape does work that must not be captured.
        self._queue(lane, ready)
        self._cuda.wait(lane.stream)
        graph = self._cuda.capture(lambda: self._queue(lane, ready), lane.stream)
        return _Ready(context=context, inputs=inputs, outputs=outputs, graph=graph)

    def _queue(self, lane: _Lane, ready: _Ready) -> None:
        for buffer in ready.inputs.values():
            self._cuda.to_device(buffer, lane.stream)
        if not ready.context.execute_async_v3(int(lane.stream)):
            raise EngineError("TensorRT failed to queue a batch; its message is above")
        for buffer in ready.outputs.values():
            self._cuda.to_host(buffer, lane.stream)

    def _release(self, ready: _Ready) -> None:
        buffers = [*ready.inputs.values(), *ready.outputs.values()]
        graphs = [] if ready.graph is None else [ready.graph]
        self._cuda.free(addresses=[], buffers=buffers, graphs=graphs, streams=[])


class TensorRtEngine:
    """Runs packed rows through a plan that was built for this GPU."""

    def __init__(self, plan: Path, precision: Precision, streams: int | None) -> None:
        card = read_card(plan)
        if card.layout is not Layout.PACKED:
            raise EngineError(f"{plan.name} is built for {card.layout.value} texts; packed rows need a packed plan")
        if card.precision is not precision:
            raise EngineError(f"{plan.name} computes in {card.precision.value}, not in {precision.value}")
        self.name = EngineName.TENSORRT
        self.precision: Precision = precision
        self.streams = streams or STREAMS
        self.length_multiple = BLOCK
        self.dynamic_shapes = False
        self._plan = LoadedPlan(plan, self.streams)

    def run(self, rows: PackedRows) -> Vectors:
        """Compute [R, L // 4, width]; see `Engine.run`."""
        feed = {tensor.name: getattr(rows, tensor.name) for tensor in self._plan.card.inputs}
        (result,) = self._plan.run(feed).values()
        return result

    def close(self) -> None:
        """Release the GPU's memory."""
        self._plan.close()
