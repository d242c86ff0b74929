"""A matrix of the pixels under the kernel, a tile at a time, then a matrix product."""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive

register(
    KernelPrimitive("im2row_nhwc", "im2row", Layout.NHWC, Layout.NHWC, ()),
    KernelPrimitive("im2col_nchw", "im2col", Layout.NCHW, Layout.NCHW, ()),
)
