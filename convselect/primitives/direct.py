"""Direct convolution: a matrix product whose rows are read in place."""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive, ungrouped
from convselect.problem import ConvProblem


def undilated_width(p: ConvProblem) -> str | None:
    return None if p.dw == 1 else f"the pixels under a kernel row must be side by side (dw={p.dw})"


_PADDED = (undilated_width, ungrouped)

register(
    KernelPrimitive("direct_nchw", "direct", Layout.NCHW, Layout.NCHW, ()),
    KernelPrimitive("direct_nhwc", "direct", Layout.NHWC, Layout.NHWC, ()),
    KernelPrimitive("direct_padded_nhwc", "direct", Layout.NHWC, Layout.NHWC, _PADDED),
    KernelPrimitive("direct_padded_nchw_nhwc", "direct", Layout.NCHW, Layout.NHWC, _PADDED),
)
