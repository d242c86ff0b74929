"""Pooling in NHWC by a kernel of ours; ATen's is several times slower than memory there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import convselect.kernels  # noqa: F401  (loads the operators)

Sizes = int | Sequence[int]


def _pair(value: Sizes, default: Sizes = ()) -> tuple[int, int]:
    """As torch reads a size: one number serves both dimensions, none takes the default."""
    values = [value] if isinstance(value, int) else list(value)
    if not values:
        return _pair(default)
    return values[0], values[-1]


def windowed(kind: str, kernel: Sizes, stride: Sizes = ()) -> str:
    """The cost model's key for a pooling with that window: "max_pool:3x3s2x2"."""
    (kh, kw), (sh, sw) = _pair(kernel), _pair(stride, kernel)
    return f"{kind}:{kh}x{kw}s{sh}x{sw}"


Arguments = tuple[list[int], bool, bool, int]
"""What `convselect::pool2d` takes after its source."""


def max_pool2d_arguments(
    src: Sequence[int],
    out: Sequence[int],
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> Arguments:
    """For `aten.max_pool2d` of [mb, c, ih, iw] = `src` with a result [mb, c, oh, ow] = `out`."""
    k, s, p, d = _pair(kernel), _pair(stride, kernel), _pair(padding), _pair(dilation)
    return [*k, *s, *p, *d, *map(int, out[2:])], True, False, 0


def avg_pool2d_arguments(
    src: Sequence[int],
    out: Sequence[int],
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Arguments:
    """The same for `aten.avg_pool2d`."""
    k, s, p = _pair(kernel), _pair(stride, kernel), _pair(padding)
    return [*k, *s, *p, 1, 1, *map(int, out[2:])], False, count_include_pad, divisor_override or 0


def mean_arguments(
    src: Sequence[int], out: Sequence[int], dims: Sequence[int] | None, keepdim: bool = False, **kwargs: object
) -> Arguments | None:
    """The same for `aten.mean`, which pools where it takes one window of all pixels; else None."""
    window = list(src[2:])
    if kwargs or not keepdim or sorted(dim % 4 for dim in dims or ()) != [2, 3]:
        return None
    if not all(isinstance(size, int) and size > 0 for size in window):
        return None
    return avg_pool2d_arguments(src, out, window)


ARGUMENTS: dict[object, Callable[..., Arguments | None]] = {
    torch.ops.aten.max_pool2d.default: max_pool2d_arguments,
    torch.ops.aten.avg_pool2d.default: avg_pool2d_arguments,
    torch.ops.aten.mean.dim: mean_arguments,
}
"""ATen's operator -> the arguments of ours, from both sizes and ATen's arguments after the source."""
