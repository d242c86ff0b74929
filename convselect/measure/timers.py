"""The timer of a machine, whichever it is."""

from __future__ import annotations

import torch

from convselect.errors import unknown_choice
from convselect.machine import Gpu, Machine, cpu, gpu
from convselect.measure.cpu import PrimitiveTimer
from convselect.measure.cuda import CudaClock, GpuTimer

Timer = PrimitiveTimer | GpuTimer


def timer_on(device: str, dtype: torch.dtype = torch.float32) -> Timer:
    """The timer of "cpu", or of "cuda", the first GPU, for tensors of `dtype`.

    Raises:
        ValueError: `device` is neither, or torch finds no GPU.
    """
    if device == "cpu":
        return PrimitiveTimer(cpu())
    if device != "cuda":
        raise unknown_choice("device", device, ("cpu", "cuda"))
    if not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU that it can use")
    return timer_of(gpu(0, dtype))


def timer_of(machine: Machine) -> Timer:
    """Times primitives on `machine`, which must be there."""
    if not isinstance(machine, Gpu):
        return PrimitiveTimer(machine)
    dtype = torch.float32 if machine.precision == "tf32" else getattr(torch, machine.precision)
    return GpuTimer(machine, dtype, CudaClock(machine.index or 0))
