"""The NVIDIA GPU that this process may use, as its driver states it. Needs neither the CUDA toolkit nor a package."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from mirror_runtime.errors import EngineError

_DRIVER = "libcuda.so.1"
_BUS = Path("/sys/bus/pci/devices")
_MODULE = Path("/proc/driver/nvidia/gpus")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # of a device's vendor, and the start of its class

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR, _MINOR = 75, 76

_CURES = {
    100: "the driver shows this process no GPU: see CUDA_VISIBLE_DEVICES; a container needs --gpus=all",
    803: "the driver's library and its kernel module are of different versions: restart the machine or the container",
}
"""By the driver's status: CUDA_ERROR_NO_DEVICE and CUDA_ERROR_SYSTEM_DRIVER_MISMATCH."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU that this process may use."""

    name: str  # such as "NVIDIA L4"
    compute_capability: str  # such as "8.9"
    cuda: tuple[int, int]  # newest CUDA version that the driver runs, such as (13, 4)

    def __str__(self) -> str:
        return f"{self.name} ({self.compute_capability})"


def this_gpu() -> Gpu:
    """Ask the driver. It starts CUDA in this process: children that are forked afterwards cannot use the GPU.

    Raises:
        EngineError: there is none; the message says whether GPU, driver or permission is missing.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        if _on_the_bus():
            raise EngineError(
                f"an NVIDIA GPU is in this machine, but its driver ({_DRIVER}) is not here: install the driver; "
                "a container needs --gpus=all"
            ) from None
        raise EngineError(f"no NVIDIA GPU was found: neither on the bus nor a driver ({_DRIVER})") from None
    if status := driver.cuInit(0):
        raise EngineError(_CURES.get(status, f"the NVIDIA driver does not start (CUDA error {status}): see nvidia-smi"))
    device, major, minor, cuda = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    statuses = (
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        driver.cuDriverGetVersion(ctypes.byref(cuda)),
    )
    if any(statuses):
        raise EngineError(f"the NVIDIA driver describes no GPU (CUDA errors {statuses}): see nvidia-smi")
    return Gpu(
        name=name.value.decode(),
        compute_capability=f"{major.value}.{minor.value}",
        cuda=(cuda.value // 1000, cuda.value % 1000 // 10),
    )


def gpu_models() -> str:
    """Return the models of this machine's GPUs, as the driver's kernel module lists them; empty without a driver."""
    files = sorted(_MODULE.glob("*/information"))
    lines = (line for file in files for line in _read(file).splitlines())
    return ", ".join(sorted(line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")))


def _on_the_bus() -> bool:
    """Return whether the machine has an NVIDIA GPU, with or without a driver."""
    devices = _BUS.iterdir() if _BUS.is_dir() else ()
    return any(_read(d / "vendor") == _NVIDIA and _read(d / "class").startswith(_DISPLAY) for d in devices)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
