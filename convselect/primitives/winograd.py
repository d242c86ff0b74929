"""Winograd F(m x n, kh x kw): tiles of m x n outputs by (m + kh - 1) (n + kw - 1) multiplications, not m n kh kw.

None is "strict": an output is computed from all inputs of its tile, also from those that its kernel does not reach.
What these contribute cancels but for rounding. So NaN and infinity fill the tile, and values far larger than their
neighbours (-9999 for no data) leave an error in it that is relative to themselves. F(2, 3) alone does not need them.
"""

from __future__ import annotations

from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.kernel import KernelPrimitive, Rule, ungrouped
from convselect.problem import ConvProblem


def only(kh: int, kw: int) -> Rule:
    def rule(p: ConvProblem) -> str | None:
        return None if (p.kh, p.kw) == (kh, kw) else f"only {kh}x{kw} kernels are supported (kh={p.kh}, kw={p.kw})"

    return rule


def dense(p: ConvProblem) -> str | None:
    if (p.sh, p.sw) != (1, 1):
        return f"only stride 1 is supported (sh={p.sh}, sw={p.sw})"
    return None if p.dh == p.dw == 1 else f"dilation is not supported (dh={p.dh}, dw={p.dw})"


_MOST_OF_DEFAULT = 5e-6
"""The error bound of the class "default"."""

# tile, kh, kw, error bound, schedules ("": fused)
_ROWS: tuple[tuple[str, int, int, float, tuple[str, ...]], ...] = (
    ("f2x2", 3, 3, 2e-6, ("", "_staged")),
    ("f2x4", 3, 3, 2e-6, ("", "_staged")),
    ("f4x4", 3, 3, 5e-6, ("", "_staged", "_lean")),
    ("f6x6", 3, 3, 2e-5, ("",)),
    ("f2x2", 5, 5, 5e-6, ("", "_staged")),
    ("f4x4", 5, 5, 2e-5, ("", "_staged")),
    ("f2x2", 7, 7, 2e-5, ("", "_staged")),
    ("f4", 1, 3, 2e-6, ("_staged",)),
    ("f4", 3, 1, 2e-6, ("_staged",)),
    ("f4", 1, 7, 5e-6, ("",)),
    ("f4", 7, 1, 5e-6, ("",)),
    ("f6", 1, 7, 2e-5, ("", "_staged")),
    ("f6", 7, 1, 2e-5, ("", "_staged")),
)

for _tile, _kh, _kw, _bound, _schedules in _ROWS:
    for _schedule in _schedules:
        register(
            KernelPrimitive(
                f"winograd_{_tile}_{_kh}x{_kw}{_schedule}_nhwc",
                "winograd",
                Layout.NHWC,
                Layout.NHWC,
                (only(_kh, _kw), dense, ungrouped),
                "default" if _bound <= _MOST_OF_DEFAULT else "fast",
                _bound,
            )
        )
