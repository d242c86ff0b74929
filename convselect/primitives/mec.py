"""MEC: src lowered over the kernel's width, patches that share rows of memory; Cho and Brand, arXiv 1706.06873."""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive, ungrouped

register(KernelPrimitive("mec_nhwc", "mec", Layout.NHWC, Layout.NHWC, (ungrouped,)))
