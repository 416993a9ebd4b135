"""The few CUDA runtime calls that a TensorRT engine needs, through NVIDIA's `cuda.bindings`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mirror_runtime.errors import EngineError
from mirror_runtime.extras import require


@dataclass(frozen=True)
class Buffer:
    """Memory for one tensor at fixed addresses: pinned on the host, where numpy sees it, and on the GPU."""

    host: NDArray[Any]
    device: int


class CudaDevice:
    """The first GPU that this process may use: its `name` and `compute_capability`, such as "NVIDIA L4" and "8.9"."""

    def __init__(self) -> None:
        self._cuda = require("cuda.bindings.runtime", "tensorrt")
        try:
            count = self._call(self._cuda.cudaGetDeviceCount)
        except (EngineError, RuntimeError) as error:  # the latter if there is no driver library
            raise EngineError(f"no NVIDIA GPU can be used here ({error}): see nvidia-smi") from error
        if count == 0:
            raise EngineError("the NVIDIA driver shows this process no GPU: see CUDA_VISIBLE_DEVICES")
        properties = self._call(self._cuda.cudaGetDeviceProperties, 0)
        self.name = properties.name.decode()
        self.compute_capability = f"{properties.major}.{properties.minor}"

    def stream(self) -> Any:
        """Create a stream that does not wait for the default one."""
        return self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)

    def wait(self, stream: Any) -> None:
        """Wait for everything in a stream."""
        self._call(self._cuda.cudaStreamSynchronize, stream)

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes of GPU memory, and return the address (a multiple of 256)."""
        return int(self._call(self._cuda.cudaMalloc, size))

    def buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Allocate memory for one tensor on the host and on the GPU."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pinned = int(self._call(self._cuda.cudaMallocHost, size))
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pinned)).view(dtype).reshape(shape)
        return Buffer(host=view, device=self.allocate(size))

    def to_device(self, buffer: Buffer, stream: Any) -> None:
        """Queue the copy from the host."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, buffer.device, buffer.host.ctypes.data, buffer.host.nbytes, kind, stream)

    def to_host(self, buffer: Buffer, stream: Any) -> None:
        """Queue the copy to the host."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, buffer.host.ctypes.data, buffer.device, buffer.host.nbytes, kind, stream)

    def capture(self, work: Callable[[], None], stream: Any) -> Any:
        """Record what `work` queues in a stream, as a graph that `launch` repeats with the same addresses."""
        # Other threads may allocate meanwhile; a capture in global mode would forbid it.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture, stream, mode)
        try:
            work()
        finally:
            graph = self._call(self._cuda.cudaStreamEndCapture, stream)
        executable = self._call(self._cuda.cudaGraphInstantiate, graph, 0)
        self._call(self._cuda.cudaGraphDestroy, graph)
        return executable

    def launch(self, graph: Any, stream: Any) -> None:
        """Queue a recorded graph."""
        self._call(self._cuda.cudaGraphLaunch, graph, stream)

    def free(self, *, addresses: list[int], buffers: list[Buffer], graphs: list[Any], streams: list[Any]) -> None:
        """Release memory, graphs and streams."""
        for graph in graphs:
            self._call(self._cuda.cudaGraphExecDestroy, graph)
        for buffer in buffers:
            self._call(self._cuda.cudaFree, buffer.device)
            self._call(self._cuda.cudaFreeHost, buffer.host.ctypes.data)
        for address in addresses:
            self._call(self._cuda.cudaFree, address)
        for stream in streams:
            self._call(self._cuda.cudaStreamDestroy, stream)

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call a CUDA function, which returns a status and at most one value; return the value."""
        status, *values = function(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(status)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise EngineError(f"CUDA cannot {function.__name__.removeprefix('cuda')}: {reason}")
        return values[0] if values else None
