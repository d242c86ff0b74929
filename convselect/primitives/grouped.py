"""Grouped 3x3 convolutions with few channels in a group: several groups share one register."""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

MOST_CHANNELS = 16
"""Channels of a group, in and out; with more, the rows of a matrix product fill the registers as well."""


def narrow_groups(p: ConvProblem) -> str | None:
    if p.g > 1 and p.ic // p.g <= MOST_CHANNELS and p.oc // p.g <= MOST_CHANNELS:
        return None
    return f"only groups of at most {MOST_CHANNELS} channels are supported (g={p.g}, ic={p.ic}, oc={p.oc})"


def three_by_three(p: ConvProblem) -> str | None:
    if p.kh == p.kw == 3 and p.dh == p.dw == 1 and p.sh == p.sw <= 2:
        return None
    return (
        f"only 3x3 kernels with stride 1 or 2 and no dilation are supported "
        f"(kh={p.kh}, kw={p.kw}, sh={p.sh}, sw={p.sw}, dh={p.dh}, dw={p.dw})"
    )


register(KernelPrimitive("grouped_nhwc", "grouped", Layout.NHWC, Layout.NHWC, (narrow_groups, three_by_three)))
