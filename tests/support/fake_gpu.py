"""A simulated GPU: stand-ins for TensorRT and CUDA that are checked against the real bindings."""

import ctypes
import dataclasses
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mirror_runtime.packing import PackedRows
from mirror_runtime.vectors import Vectors
from tests.support.tensorrt_binding import FakeTensorRT, StandIn, binding

INPUTS = ("input_ids", "position_ids", "segment_ids")
NAME, COMPUTE_CAPABILITY = "NVIDIA L4", "8.9"

Compute = Callable[[PackedRows], Vectors]
"""A packed engine's function from rows to vectors."""


class FakeDriver:
    """`libcuda.so.1` of a machine with one GPU, or of one whose `cuInit` returns another status."""

    def __init__(self, status: int = 0, cuda: int = 13040) -> None:
        self.status, self.cuda = status, cuda

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = NAME.encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = dict(zip((75, 76), map(int, COMPUTE_CAPABILITY.split(".")), strict=True))[attribute]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.cuda
        return 0


def install_driver(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> None:
    """Replace NVIDIA's driver library by a stand-in; None takes it away."""
    real = ctypes.CDLL

    def load(name: Any, *args: Any, **kwargs: Any) -> Any:
        if name != "libcuda.so.1":
            return real(name, *args, **kwargs)
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)


class FakeCuda:
    """`cuda.bindings.runtime` over host memory. Signatures are the real ones; a graph replays the work it captured."""

    def __init__(self) -> None:
        self._real = importlib.import_module("cuda.bindings.runtime")
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.memory: dict[int, Any] = {}
        self.capturing: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if not inspect.isroutine(real):
            return real

        def call(*args: Any) -> Any:
            inspect.signature(real).bind(*args)
            self.calls.append((name, args))
            answer = getattr(type(self), f"do_{name}", None)
            values = answer(self, *args) if answer is not None else None
            return (self._real.cudaError_t.cudaSuccess, *(values or ()))

        call.__name__ = name
        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def queue(self, work: Callable[[], object]) -> None:
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def do_cudaGetDeviceCount(self) -> tuple[int]:
        return (1,)

    def do_cudaGetDeviceProperties(self, device: int) -> tuple[Any]:
        return (types.SimpleNamespace(name=NAME.encode(), major=8, minor=9),)

    def do_cudaStreamCreateWithFlags(self, flags: int) -> tuple[int]:
        return (100 + len(self.calls),)

    def do_cudaMalloc(self, size: int) -> tuple[int]:
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return (ctypes.addressof(block),)

    do_cudaMallocHost = do_cudaMalloc

    def do_cudaFree(self, address: int) -> None:
        del self.memory[address]

    do_cudaFreeHost = do_cudaFree

    def do_cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: Any) -> None:
        self.queue(lambda: ctypes.memmove(to, source, size))

    def do_cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        self.capturing = []

    def do_cudaStreamEndCapture(self, stream: Any) -> tuple[int]:
        assert self.capturing is not None
        self.graphs[len(self.graphs) + 1] = self.capturing
        self.capturing = None
        return (len(self.graphs),)

    def do_cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int]:
        return (graph,)

    def do_cudaGraphLaunch(self, graph: int, stream: Any) -> None:
        for work in self.graphs[graph]:
            work()


class Context:
    """The state of one execution context, and the function that its engine computes."""

    def __init__(self, compute: Compute, dim: int) -> None:
        self.compute, self.dim = compute, dim
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def array(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def output_shape(self) -> tuple[int, int, int]:
        rows, length = self.shapes["input_ids"]
        return rows, length // 4, self.dim

    def run(self) -> None:
        rows = PackedRows(**{name: self.array(name, np.int64, self.shapes[name]) for name in INPUTS})
        self.array("embedding", np.float32, self.output_shape())[...] = self.compute(rows)


@dataclasses.dataclass
class Gpu:
    """The two stand-ins in use by one test."""

    trt: FakeTensorRT
    cuda: FakeCuda


def install(monkeypatch: pytest.MonkeyPatch, version: str, compute: Compute, dim: int) -> Gpu:
    """Replace the modules `tensorrt` and `cuda.bindings.runtime`, and the driver, by stand-ins."""
    cuda = FakeCuda()

    def create_execution_context(strategy: Any) -> StandIn:
        """Build a stand-in with its own state, so that contexts do not share shapes or addresses."""
        state = Context(compute, dim)
        own = FakeTensorRT(trt.spec)
        own.calls, own.enums = trt.calls, trt.enums
        own.answers = {
            **trt.answers,
            "IExecutionContext.set_input_shape": lambda name, shape: state.shapes.update({name: shape}) or True,
            "IExecutionContext.set_tensor_address": lambda name, at: state.addresses.update({name: at}) or True,
            "IExecutionContext.get_tensor_shape": lambda name: state.shapes.get(name) or state.output_shape(),
            "IExecutionContext.execute_async_v3": lambda stream: cuda.queue(state.run) or True,
        }
        return StandIn(own, "IExecutionContext")

    trt = install_tensorrt(monkeypatch, version, dim)
    install_driver(monkeypatch, FakeDriver())
    trt.answers["ICudaEngine.create_execution_context"] = create_execution_context
    trt.answers["ICudaEngine.device_memory_size_v2"] = 4096
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    return Gpu(trt=trt, cuda=cuda)


def install_tensorrt(monkeypatch: pytest.MonkeyPatch, version: str, dim: int = 8) -> FakeTensorRT:
    """Replace the module `tensorrt` by one that builds a packed encoder; tensor 3 of its engine is the output."""
    names, parsed = (*INPUTS, "embedding"), iter(INPUTS)
    added: list[object] = []
    trt = FakeTensorRT(binding(version))
    io, kinds = trt.TensorIOMode, trt.DataType

    def add_profile(profile: object) -> int:
        added.append(profile)
        return len(added) - 1

    trt.answers = {
        "INetworkDefinition.num_inputs": 3,
        "ITensor.name": lambda: next(parsed),
        "IBuilderConfig.add_optimization_profile": add_profile,
        "Builder.build_serialized_network": b"plan",
        "ITimingCache.serialize": b"timings",
        "ICudaEngine.num_optimization_profiles": lambda: len(added),
        "ICudaEngine.num_io_tensors": 4,
        "ICudaEngine.get_tensor_name": lambda i: names[i],
        "ICudaEngine.get_tensor_mode": lambda name: io.OUTPUT if name == "embedding" else io.INPUT,
        "ICudaEngine.get_tensor_dtype": lambda name: kinds.FLOAT if name == "embedding" else kinds.INT64,
        "ICudaEngine.get_tensor_shape": lambda name: (-1, -1, dim) if name == "embedding" else (-1, -1),
        "nptype": lambda kind: {"INT64": np.int64, "FLOAT": np.float32}[kind.name],
    }
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt
