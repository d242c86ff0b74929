"""Interpolation by our kernel: its values, and that each pixel it reads is the one that ATen reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from convselect.primitives.upsampling import reads_the_same

OPS = torch.ops.convselect
aten = torch.ops.aten

GEOMETRIES = [
    ((1, 1), (1, 1)),
    ((1, 1), (5, 7)),
    ((1, 9), (4, 9)),
    ((6, 5), (12, 10)),
    ((7, 5), (3, 11)),
    ((16, 24), (5, 6)),
    ((9, 300), (4, 7)),
    ((5, 7), (13, 600)),
    ((2, 3), (2, 3)),
    ((64, 3), (70, 1)),
]
"""Height and width, before and after."""
MODES = [(False, False), (True, False), (True, True)]
"""(linear, align_corners)."""


def drawn(*size: int) -> Tensor:
    """In NHWC."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))
    return x.contiguous(memory_format=torch.channels_last)


def ours(x: Tensor, size: Sequence[int], linear: bool, corners: bool, *scales: float | None) -> Tensor:
    result: Tensor = OPS.upsample2d(x, size, linear, corners, *(scales or (None, None)))
    return result


def atens(x: Tensor, size: Sequence[int], linear: bool, corners: bool, *scales: float | None) -> Tensor:
    """Of the layout that `x` has."""
    options = (corners,) if linear else ()
    operator = aten.upsample_bilinear2d if linear else aten.upsample_nearest2d
    result: Tensor = operator(x, size, *options, *(scales or (None, None)))
    return result


def matrix(before: int, after: int, linear: bool, corners: bool) -> Tensor:
    """f64 [after, before]: the weight of each pixel of one dimension in each of the result.

    Places are computed in float32, as they decide by rounding which pixels are read.
    """
    weights = torch.zeros(after, before, dtype=torch.float64)
    step = np.float32(before) / np.float32(after)
    if corners:
        step = np.float32(before - 1) / np.float32(after - 1) if after > 1 else np.float32(0)
    for i in range(after):
        place = np.float32(i) * step if corners or not linear else (np.float32(i) + np.float32(0.5)) * step
        if linear and not corners:
            place = max(place - np.float32(0.5), np.float32(0))
        low = min(math.floor(place), before - 1)
        share = min(float(place) - low, 1.0) if linear else 0.0
        weights[i, low] += 1 - share
        weights[i, min(low + 1, before - 1)] += share
    return weights


@pytest.mark.parametrize("channels", [1, 3, 4, 17, 33, 64])
@pytest.mark.parametrize("mode", MODES, ids=["nearest", "bilinear", "corners"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_as_in_float64(
    geometry: tuple[tuple[int, int], tuple[int, int]], mode: tuple[bool, bool], channels: int
) -> None:
    before, after = geometry
    x = drawn(2, channels, *before)
    got = ours(x, after, *mode)
    rows, columns = (matrix(*lengths, *mode) for lengths in zip(before, after, strict=True))
    want = rows @ x.double() @ columns.T
    assert got.stride() == torch.empty_like(want, memory_format=torch.channels_last).stride()
    if mode[0]:
        assert (got - want).norm() <= 1e-6 * max(want.norm().item(), 1.0)
    else:
        assert torch.equal(got, want.float())


@pytest.mark.parametrize("mode", MODES, ids=["nearest", "bilinear", "corners"])
@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_and_columns(mode: tuple[bool, bool], threads: int, set_threads) -> None:
    """Of several tasks, each with columns and rows of its own."""
    set_threads(threads)
    for channels in (1, 3, 21, 40):
        x = drawn(2, channels, 70, 90)
        torch.testing.assert_close(ours(x, (131, 541), *mode), atens(x.contiguous(), (131, 541), *mode))


SCALES = (0.3, 0.5, 0.75, 0.9, 1.0, 1.25, 1.3, 1.5, 1.99, 2.0, 2.1, 2.5, 3.0, 3.7, 4.0, 10.5)


def test_nearest_pixels_are_those_of_aten() -> None:
    """Of sizes and scales as `interpolate` passes them on, wherever ATen's own kernels agree."""
    compared = 0
    for before, scale, recompute in itertools.product(range(1, 41), SCALES, (None, True, False)):
        after = math.floor(before * scale)
        given = None if recompute else scale
        if after == 0 or not reads_the_same((before, 1), (after, 1), given, None):
            continue
        compared += 1
        x = torch.arange(8.0 * before).view(1, before, 1, 8).permute(0, 3, 1, 2)
        want = F.interpolate(x.contiguous(), scale_factor=(scale, 1.0), recompute_scale_factor=recompute)
        assert torch.equal(ours(x, (after, 1), False, False, given, None), want), (before, scale, recompute)
        assert torch.equal(atens(x, (after, 1), False, False, given, None), want), (before, scale, recompute)
    assert compared > 1500


def test_a_size_that_a_scale_does_not_explain_is_left_to_aten() -> None:
    """ATen takes 3 pixels for themselves in NHWC, and in NCHW, in some versions, for 0, 0 and 1 at a scale of 1.3."""
    assert not reads_the_same((3, 3), (3, 3), 1.3, 1.3)
    assert not reads_the_same((3, 3), (6, 6), 2.1, 2.1)
    assert reads_the_same((3, 3), (6, 6), 2.0, 2.0)
    assert reads_the_same((3, 3), (6, 6), None, -1.0)
    assert reads_the_same((3, 4), (4, 5), 1.5, 1.3)


@pytest.mark.parametrize("channels", [1, 3, 8, 40])
@pytest.mark.parametrize("mode", MODES, ids=["nearest", "bilinear", "corners"])
def test_what_is_not_finite_stays_where_it_is_in_aten(mode: tuple[bool, bool], channels: int) -> None:
    x = drawn(1, channels, 9, 11)
    x[0, 0, 0, 0], x[0, -1, 4, 5], x[0, 0, 8, 10] = math.nan, math.inf, -math.inf
    for size in ((9, 11), (18, 22), (5, 4), (20, 11)):
        want = atens(x.contiguous(), size, *mode)
        torch.testing.assert_close(ours(x, size, *mode), want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (0, 3, 4, 5), (1, 40, 1, 1), (2, 1, 3, 3)])
@pytest.mark.parametrize("scale", [None, 1.7])
def test_opcheck(linear: bool, size: tuple[int, ...], scale: float | None) -> None:
    torch.library.opcheck(OPS.upsample2d.default, (drawn(*size), (7, 6), linear, False, scale, None))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("src must be a float32 tensor", (drawn(2, 3, 4, 5).double(), (8, 8))),
        ("src has 3 dimensions", (drawn(2, 3, 4, 5)[0], (8, 8))),
        ("size has 1 numbers", (drawn(2, 3, 4, 5), (8,))),
        ("a height or width is 0, must be at least 1", (drawn(2, 3, 4, 5), (8, 0))),
        ("a scale is 0", (drawn(2, 3, 4, 5), (8, 8), 0.0)),
    ],
)
def test_invalid_arguments_are_named(message: str, arguments: tuple) -> None:
    x, size, *scale = arguments
    with pytest.raises(RuntimeError, match=message):
        OPS.upsample2d(x, size, True, False, *scale, *[None] * (2 - len(scale)))
