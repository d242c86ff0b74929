"""The timer of a machine, whichever it is."""

from __future__ import annotations

import torch

from convselect.machine import Gpu, Machine, machine_of
from convselect.measure.cpu import PrimitiveTimer
from convselect.measure.cuda import CudaClock, GpuTimer

Timer = PrimitiveTimer | GpuTimer


def timer_on(device: str, dtype: torch.dtype = torch.float32) -> Timer:
    """The timer of `machine_of(device, dtype)`, and its errors."""
    return timer_of(machine_of(device, dtype))


def timer_of(machine: Machine) -> Timer:
    """Times primitives on `machine`, which must be there."""
    if not isinstance(machine, Gpu):
        return PrimitiveTimer(machine)
    dtype = torch.float32 if machine.precision == "tf32" else getattr(torch, machine.precision)
    return GpuTimer(machine, dtype, CudaClock(machine.index or 0))
