"""Interpolation in NHWC by a kernel of ours; ATen's is slow in NCHW, and in NHWC where there are few channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

import convselect.kernels  # noqa: F401  (loads the operators)

aten = torch.ops.aten

Scale = float | None
"""Pixels of the result for one of the source; None, or what is not positive, takes the ratio of the sizes."""


def _given(scale: Scale) -> Scale:
    return scale if scale is not None and scale > 0 else None


def nearest_arguments(
    size: Sequence[Any], scale_h: Scale = None, scale_w: Scale = None
) -> tuple[Sequence[Any], bool, bool, Scale, Scale]:
    """What `convselect::upsample2d` takes after its source, for `aten.upsample_nearest2d`."""
    return size, False, False, _given(scale_h), _given(scale_w)


def bilinear_arguments(
    size: Sequence[Any], align_corners: bool, scale_h: Scale = None, scale_w: Scale = None
) -> tuple[Sequence[Any], bool, bool, Scale, Scale]:
    """The same for `aten.upsample_bilinear2d`."""
    return size, True, align_corners, _given(scale_h), _given(scale_w)


ARGUMENTS: dict[object, Callable[..., tuple[Sequence[Any], bool, bool, Scale, Scale]]] = {
    aten.upsample_nearest2d.default: nearest_arguments,
    aten.upsample_bilinear2d.default: bilinear_arguments,
}
"""ATen's operator -> the arguments of ours, from ATen's after the source."""


def reads_the_same(source: Sequence[int | torch.SymInt], result: Sequence[int | torch.SymInt], *scales: Scale) -> bool:
    """Whether nearest pixels are known to be the same in every kernel of ATen's, for these heights and widths.

    Some ignore the scale where the result has the source's size or twice that. A scale of 1.3 leads to that as well.
    """
    for before, after, scale in zip(source, result, map(_given, scales), strict=True):
        if scale is None or (float(scale).is_integer() and statically_known_true(after == int(scale) * before)):
            continue
        if not (statically_known_true(after != before) and statically_known_true(after != 2 * before)):
            return False
    return True
