"""Times what lies between convolutions: layout transforms, and the operators that a plan runs in each layout."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

import convselect.kernels  # noqa: F401  (loads the operators)
from convselect.layout import Layout, holds
from convselect.measure.cpu import Run, draw, interleaved, robust_ms
from convselect.primitives import upsampling
from convselect.primitives.pooling import ARGUMENTS, windowed

aten = torch.ops.aten

SHAPES: tuple[tuple[int, int, int, int], ...] = (
    (1, 64, 56, 56),
    (1, 256, 14, 14),
    (1, 64, 112, 112),
    (1, 512, 7, 7),
    (1, 256, 56, 56),
    (1, 32, 28, 28),
    (1, 3, 224, 224),
    (1, 128, 28, 28),
    (1, 1024, 14, 14),
    (1, 24, 56, 56),
    (1, 2048, 7, 7),
    (1, 512, 28, 28),
    (1, 96, 112, 112),
    (1, 160, 7, 7),
    (1, 64, 224, 224),
    (1, 192, 35, 35),
    (1, 16, 14, 14),
    (8, 64, 56, 56),
    (8, 512, 7, 7),
)
"""(n, c, h, w) of activations in common networks; any prefix spans a range of sizes."""

Operator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes two sources f32 [n, c, h, w], dense in the same layout, of which it may read one."""


class OperatorTime(NamedTuple):
    """`key`: the operator, and its layout after a dot; `nbytes`: read and written together; `ms` a call."""

    key: str
    nbytes: int
    threads: int
    ms: float


def _batch_norm(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    ones = x.new_ones(x.shape[1])
    y: torch.Tensor = torch.ops.convselect.scale_shift(x, ones, ones, 0, 0.0, 0.0)
    return y


def _pool(kind: str, operator: Callable[..., torch.Tensor], *arguments: int) -> tuple[str, int, Operator]:
    """What a plan runs for `operator` with this kernel, stride and padding: ATen's in NCHW, ours in NHWC."""

    def run(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if not holds(x, Layout.NHWC):
            result: torch.Tensor = operator(x, *arguments)
            return result
        size, stride, padding = arguments
        out = [(length + 2 * padding - size) // stride + 1 for length in x.shape[2:]]
        ours = ARGUMENTS[operator](x.shape, (*x.shape[:2], *out), *arguments)
        assert ours is not None
        result = torch.ops.convselect.pool2d(x, *ours)
        return result

    return windowed(kind, *arguments[:2]), 1, run


def _upsample(operator: Callable[..., torch.Tensor], *align_corners: bool) -> Operator:
    """To twice the size, as a plan runs it: ATen's in NCHW, ours in NHWC."""

    def run(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        size = [2 * length for length in x.shape[2:]]
        if not holds(x, Layout.NHWC):
            return operator(x, size, *align_corners)
        result: torch.Tensor = torch.ops.convselect.upsample2d(x, *upsampling.ARGUMENTS[operator](size, *align_corners))
        return result

    return run


OPERATORS: tuple[tuple[str, int, Operator], ...] = (
    _pool("max_pool", aten.max_pool2d.default, 3, 2, 1),
    _pool("max_pool", aten.max_pool2d.default, 2, 2, 0),
    _pool("max_pool", aten.max_pool2d.default, 3, 1, 1),
    _pool("avg_pool", aten.avg_pool2d.default, 3, 1, 1),
    _pool("avg_pool", aten.avg_pool2d.default, 2, 2, 0),
    ("upsample_nearest", 1, _upsample(aten.upsample_nearest2d.default)),
    ("upsample_bilinear", 1, _upsample(aten.upsample_bilinear2d.default, False)),
    ("cat", 2, lambda x, y: torch.cat([x, y], 1)),
    ("add", 2, lambda x, y: x + y),
    ("elementwise", 1, lambda x, _: torch.relu(x)),
    ("batch_norm", 1, _batch_norm),
    ("mean", 1, lambda x, _: x.mean((2, 3), keepdim=True)),
    ("adaptive_avg_pool", 1, lambda x, _: F.adaptive_avg_pool2d(x, 1)),
)
"""(key, sources read, operator)."""


def time_operators(
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES, *, rounds: int = 5, deadline: float | None = None
) -> list[OperatorTime]:
    """Times every operator of `OPERATORS` and the transforms "to_nhwc" and "to_nchw" on every shape.

    Sources are warm, as just written. The threads are torch's current number. Shapes that the `deadline`
    (perf_counter seconds) leaves no time for are left out.
    """
    rows: list[OperatorTime] = []
    with torch.inference_mode():
        for shape in shapes:
            if deadline is not None and time.perf_counter() >= deadline:
                break
            rows += _time_shape(shape, rounds, deadline)
    return rows


def time_transforms(
    shapes: Sequence[tuple[int, int, int, int]], *, rounds: int = 5, deadline: float | None = None
) -> list[OperatorTime]:
    """The transforms alone; calibration has no time for more."""
    rows: list[OperatorTime] = []
    with torch.inference_mode():
        for shape in shapes:
            if deadline is not None and time.perf_counter() >= deadline:
                break
            rows += _measure(_transforms(shape), rounds, deadline)
    return rows


Case = tuple[str, int, torch.Tensor, Run]
"""(key, bytes, the source to warm, the call)."""


def _transforms(shape: tuple[int, int, int, int]) -> list[Case]:
    cases: list[Case] = []
    plain = draw(*shape)
    for target in Layout:
        source = Layout.NHWC if target is Layout.NCHW else Layout.NCHW
        src = plain.contiguous(memory_format=source.memory_format)
        nhwc = target is Layout.NHWC
        cases.append((f"to_{target}", 8 * src.numel(), src, _transform(src, nhwc)))
    return cases


def _transform(src: torch.Tensor, nhwc: bool) -> Run:
    return lambda: torch.ops.convselect.to_layout(src, nhwc)


def _time_shape(shape: tuple[int, int, int, int], rounds: int, deadline: float | None) -> list[OperatorTime]:
    cases = _transforms(shape)
    plain = draw(*shape)
    for layout in Layout:
        x = plain.contiguous(memory_format=layout.memory_format)
        y = x.clone(memory_format=torch.preserve_format)
        for key, sources, operator in OPERATORS:
            nbytes = 4 * (sources * x.numel() + operator(x, y).numel())
            cases.append((f"{key}.{layout}", nbytes, x, _call(operator, x, y)))
    return _measure(cases, rounds, deadline)


def _call(operator: Operator, x: torch.Tensor, y: torch.Tensor) -> Run:
    return lambda: operator(x, y)


def _measure(cases: Sequence[Case], rounds: int, deadline: float | None) -> list[OperatorTime]:
    for _, _, _, run in cases:
        run()

    def warm_source(index: int) -> None:
        cases[index][2].mul_(1.0)

    times = interleaved([run for *_, run in cases], rounds=rounds, between=warm_source, deadline=deadline)
    threads = torch.get_num_threads()
    return [
        OperatorTime(key, nbytes, threads, float(ms))
        for (key, nbytes, _, _), ms in zip(cases, robust_ms(times), strict=True)
        if ms == ms
    ]
