"""Winograd F(2x2, 3x3) and F(4x4, 3x3): a quarter (F(4x4)) or 4/9 (F(2x2)) of the direct multiplications."""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive, ungrouped
from convselect.problem import ConvProblem


def three_by_three(p: ConvProblem) -> str | None:
    return None if p.kh == p.kw == 3 else f"only 3x3 kernels are supported (kh={p.kh}, kw={p.kw})"


def dense(p: ConvProblem) -> str | None:
    if (p.sh, p.sw) != (1, 1):
        return f"only stride 1 is supported (sh={p.sh}, sw={p.sw})"
    return None if p.dh == p.dw == 1 else f"dilation is not supported (dh={p.dh}, dw={p.dw})"


def _row(name: str, accuracy: str, error_bound: float) -> KernelPrimitive:
    rules = (three_by_three, dense, ungrouped)
    return KernelPrimitive(name, "winograd", Layout.NHWC, Layout.NHWC, rules, accuracy, error_bound)


register(
    _row("winograd_f2x2_3x3_nhwc", "strict", 2e-6),
    _row("winograd_f4x4_3x3_nhwc", "default", 5e-6),
    _row("winograd_f2x2_3x3_staged_nhwc", "strict", 2e-6),
    _row("winograd_f4x4_3x3_staged_nhwc", "default", 5e-6),
)
