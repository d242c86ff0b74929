"""Depthwise convolutions, one filter a channel: any filter, stride, dilation and padding."""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

MOST_TAPS = 121
"""Pointers of a window that the NHWC kernel keeps: up to 11x11."""


def one_filter_a_channel(p: ConvProblem) -> str | None:
    if p.g == p.ic == p.oc:
        return None
    return f"only one filter a channel is supported (g={p.g}, ic={p.ic}, oc={p.oc})"


def few_taps(p: ConvProblem) -> str | None:
    taps = p.kh * p.kw
    return None if taps <= MOST_TAPS else f"at most {MOST_TAPS} filter taps are supported (kh={p.kh}, kw={p.kw})"


register(
    KernelPrimitive("depthwise_nhwc", "depthwise", Layout.NHWC, Layout.NHWC, (one_filter_a_channel, few_taps)),
    KernelPrimitive("depthwise_nchw", "depthwise", Layout.NCHW, Layout.NCHW, (one_filter_a_channel,)),
)
