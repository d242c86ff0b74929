"""1x1 convolutions as a matrix product over the pixels, without a copy."""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive, ungrouped
from convselect.problem import ConvProblem


def one_by_one(p: ConvProblem) -> str | None:
    return None if p.kh == p.kw == 1 else f"only 1x1 kernels are supported (kh={p.kh}, kw={p.kw})"


def unpadded(p: ConvProblem) -> str | None:
    return None if p.ph == p.pw == 0 else f"padding is not supported (ph={p.ph}, pw={p.pw})"


_RULES = (one_by_one, unpadded, ungrouped)

register(
    KernelPrimitive("pointwise_nhwc", "pointwise", Layout.NHWC, Layout.NHWC, _RULES),
    KernelPrimitive("pointwise_nchw", "pointwise", Layout.NCHW, Layout.NCHW, _RULES),
)
