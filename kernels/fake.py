"""Shapes and strides of the operators' results, for tracing without data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convselect.layout import Layout, strides

Ints = Sequence[int]


def _empty(like: torch.Tensor, size: Ints, nhwc: bool) -> torch.Tensor:
    return like.new_empty_strided(tuple(size), strides(size, Layout.NHWC if nhwc else Layout.NCHW))


@torch.library.register_fake("convselect::pack")
def _pack(weight: torch.Tensor, kernel: int, sizes: Ints, geometry: Ints) -> torch.Tensor:
    floats = torch.ops.convselect.packed_bytes(kernel, sizes, geometry) // 4
    return weight.new_empty((1, 1, 1, floats))


@torch.library.register_fake("convselect::conv")
def _conv(
    src: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kernel: int,
    geometry: Ints,
    activation: int,
    alpha: float,
    beta: float,
) -> torch.Tensor:
    mb, _, ih, iw = src.shape
    oc, kh, kw, sh, sw, ph, pw, dh, dw, _ = geometry
    oh = (ih + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    ow = (iw + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    return _empty(src, (mb, oc, oh, ow), torch.ops.convselect.dst_nhwc(kernel))


@torch.library.register_fake("convselect::conv_out")
def _conv_out(*_: object) -> None:
    return None


@torch.library.register_fake("convselect::to_layout")
def _to_layout(src: torch.Tensor, nhwc: bool) -> torch.Tensor:
    return _empty(src, src.shape, nhwc)


@torch.library.register_fake("convselect::scale_shift")
def _scale_shift(
    src: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, activation: int, alpha: float, beta: float
) -> torch.Tensor:
    return _empty(src, src.shape, not src.is_contiguous())


@torch.library.register_fake("convselect::linear")
def _linear(
    src: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: int, alpha: float, beta: float
) -> torch.Tensor:
    return src.new_empty((src.shape[0], weight.shape[0]))


@torch.library.register_fake("convselect::pool2d")
def _pool2d(src: torch.Tensor, geometry: Ints, max: bool, include_pad: bool, divisor: int) -> torch.Tensor:
    return _empty(src, (*src.shape[:2], *geometry[8:]), True)


@torch.library.register_fake("convselect::upsample2d")
def _upsample2d(
    src: torch.Tensor, size: Ints, linear: bool, align_corners: bool, scale_h: float | None, scale_w: float | None
) -> torch.Tensor:
    return _empty(src, (*src.shape[:2], *size), True)
