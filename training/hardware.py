"""The hardware of a run: device, precision, and the processes that a launcher started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mirror_runtime.errors import EngineError
from mirror_runtime.host import has_bf16
from training.recipe import Device, TunePrecision

LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables with the number of processes: of `torchrun` and of `accelerate launch` with GPUs, and of the
MPI implementations that `accelerate launch` uses on CPUs."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware of a run, with every `auto` decided."""

    device: Device  # of this process
    precision: TunePrecision
    rank: int = 0  # number of this process, from 0. Only process 0 writes and reports.
    processes: int = 1  # number of processes that share each batch

    @property
    def writes(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which matrix products run in `precision`."""
        if self.precision is TunePrecision.FP32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.value, dtype=torch.bfloat16)

    def generator(self) -> torch.Generator:
        """Return the generator from which the device's dropout draws."""
        if self.device is Device.CUDA:
            return torch.cuda.default_generators[torch.cuda.current_device()]
        return torch.default_generator

    def share(self, count: int) -> slice:
        """Return this process's part of a batch of `count` texts, a multiple of `processes`."""
        size = count // self.processes
        return slice(self.rank * size, (self.rank + 1) * size)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Concatenate all processes' tensors, which have one shape, in the order of ranks; the result has no graph."""
        if self.processes == 1:
            return own.detach()
        from accelerate.utils import gather

        gathered: torch.Tensor = gather(own.detach().to(self.device.value))
        return gathered.to(own.device)

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace every gradient by its sum over all processes."""
        if self.processes == 1:
            return
        from accelerate.utils import reduce

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        summed: torch.Tensor = reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="sum")
        start = 0
        for gradient in gradients:
            gradient.copy_(summed[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()


def choose_hardware(device: Device, precision: TunePrecision) -> Hardware:
    """Decide every `auto` on this machine, and join the other processes of a launch."""
    if device is Device.AUTO:
        device = Device.CUDA if torch.cuda.is_available() else Device.CPU
    if device is Device.CUDA and not torch.cuda.is_available():
        raise EngineError("--device cuda: PyTorch finds no NVIDIA GPU. Install a CUDA build, or use --device cpu")
    rank, processes = _join(device)
    if precision is TunePrecision.AUTO:
        cuda = device is Device.CUDA
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else has_bf16()
        precision = TunePrecision.BF16 if bf16 else TunePrecision.FP32
    return Hardware(device=device, precision=precision, rank=rank, processes=processes)


def _join(device: Device) -> tuple[int, int]:
    if all(os.environ.get(name, "1") == "1" for name in LAUNCHED):
        return 0, 1
    from accelerate import PartialState  # a second of import time, which a run of one process does not need

    state = PartialState(cpu=device is Device.CPU)  # also selects this process's GPU
    return state.process_index, state.num_processes
