"""Compare a plan's vectors with the reference's on this GPU, using only numpy and the NVIDIA driver.

`to_tensorrt.py --script` copies this file beside `build_engine.py`, which discards a plan that fails. This short proof
uses a few dozen texts; a machine with this project installed proves plans with the runtime itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Driver:
    """GPU memory and one stream, in the context that TensorRT uses too.

    Raises:
        RuntimeError: a driver call failed.
    """

    def __init__(self) -> None:
        self._cuda: Any = ctypes.CDLL("libcuda.so.1")
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        non_blocking = 1
        self._call("cuStreamCreate", ctypes.byref(stream), non_blocking)
        self.stream = int(stream.value or 0)

    def put(self, array: NDArray[Any]) -> int:
        """Copy an array to new GPU memory, and return its address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(array.nbytes))
        self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        return int(address.value)

    def get(self, address: int, array: NDArray[Any]) -> None:
        """Wait for the stream, then fill an array from GPU memory."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))
        host, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoH_v2", host, ctypes.c_uint64(address), size)

    def free(self, address: int) -> None:
        """Free GPU memory."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")


def prove(trt: Any, engine: Any, samples: Path, driver: Any | None = None) -> tuple[float, float]:
    """Run stored batches through an engine and compare with stored vectors.

    Args:
        trt: the module `tensorrt`.
        engine: deserialised.
        samples: the file that the exporter's `write_samples` wrote.
        driver: see `Driver`; None to create one.

    Returns:
        The worst cosine of any text, or -1 where a vector is not finite; and the floor that it must reach.

    Raises:
        RuntimeError: CUDA or TensorRT failed.
    """
    stored = np.load(samples)
    driver = driver or Driver()
    worst = 1.0
    for batch in range(int(stored["batches"])):
        prefix = f"{batch}/input/"
        feed = {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}
        vectors = stored[f"{batch}/vectors"]
        out = _run(trt, engine, driver, feed, str(stored["output"])).reshape(-1, vectors.shape[1])
        found, expected = _numbers(out[stored[f"{batch}/slots"]]), _numbers(vectors)
        if not np.isfinite(found).all():
            return -1.0, float(stored["floor"])
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        worst = min(worst, float(((found * expected).sum(1) / np.maximum(lengths, 1e-12)).min()))
    return worst, float(stored["floor"])


def _numbers(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Convert vectors to numbers for a cosine: the bits of packed binary vectors become -1 and 1."""
    if vectors.dtype == np.uint8:
        return 2.0 * np.unpackbits(vectors, axis=-1) - 1.0
    return vectors.astype(np.float64)


def _run(trt: Any, engine: Any, driver: Any, feed: Mapping[str, NDArray[Any]], output: str) -> NDArray[Any]:
    """Run one batch and return one output."""
    context = engine.create_execution_context()
    if not context.set_optimization_profile_async(_profile(engine, feed), driver.stream):
        raise RuntimeError("TensorRT rejects its own profile")
    for name, array in feed.items():
        if not context.set_input_shape(name, tuple(array.shape)):
            raise RuntimeError(f"TensorRT rejects shape {array.shape} of {name}")
    arrays: dict[str, NDArray[Any]] = {}
    addresses: dict[str, int] = {}
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        shape = tuple(int(size) for size in context.get_tensor_shape(name))
        empty = np.zeros(shape, trt.nptype(engine.get_tensor_dtype(name)))
        arrays[name] = np.ascontiguousarray(feed.get(name, empty))
        addresses[name] = driver.put(arrays[name])
        context.set_tensor_address(name, addresses[name])
    if not context.execute_async_v3(driver.stream):
        raise RuntimeError("TensorRT failed to run the engine")
    driver.get(addresses[output], arrays[output])
    for address in addresses.values():
        driver.free(address)
    return arrays[output]


def _profile(engine: Any, feed: Mapping[str, NDArray[Any]]) -> int:
    """Return the index of a profile that covers the shapes of a batch."""
    for index in range(engine.num_optimization_profiles):
        least, _, most = zip(*(engine.get_tensor_profile_shape(name, index) for name in feed), strict=True)
        if all(
            all(a <= x <= b for a, x, b in zip(low, array.shape, high, strict=True))
            for low, array, high in zip(least, feed.values(), most, strict=True)
        ):
            return index
    raise RuntimeError(f"the engine has no profile for {[array.shape for array in feed.values()]}")
