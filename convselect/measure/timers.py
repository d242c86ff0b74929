"""The timer of a machine, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convselect.machine import Gpu, Machine, machine_of
from convselect.measure.cpu import PrimitiveTimer
from convselect.measure.cuda import CudaClock, GpuTimer
from convselect.measure.operators import time_transforms

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


def transforms_on(
    timer: Timer, shapes: Sequence[tuple[int, int, int, int]], rounds: int, deadline: float | None
) -> Sequence[tuple[str, int, int, float]]:
    """(key, bytes read and written, threads, ms) of both changes of layout, as a plan runs them on the timer's machine.

    shapes: of the sources, [n, c, h, w].
    """
    time_all = timer.time_transforms if isinstance(timer, GpuTimer) else time_transforms
    return time_all(shapes, rounds=rounds, deadline=deadline)
