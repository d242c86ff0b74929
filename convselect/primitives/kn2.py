"""The sum over the taps of shifted 1x1 convolutions; arXiv 1709.03395."""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive, ungrouped
from convselect.problem import ConvProblem


def unit_stride(p: ConvProblem) -> str | None:
    return None if p.sh == p.sw == 1 else f"only stride 1 is supported (sh={p.sh}, sw={p.sw})"


_RULES = (unit_stride, ungrouped)

register(
    KernelPrimitive("kn2row_nchw", "kn2row", Layout.NCHW, Layout.NCHW, _RULES),
    KernelPrimitive("kn2col_nhwc", "kn2col", Layout.NHWC, Layout.NHWC, _RULES),
)
