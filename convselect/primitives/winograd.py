"""Winograd F(m x n, kh x kw): tiles of m x n outputs by (m + kh - 1) (n + kw - 1) multiplications, not m n kh kw."""

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


_BOUNDS = {"strict": 2e-6, "default": 5e-6, "fast": 2e-5}

# tile, kh, kw, accuracy, schedules ("": fused)
_ROWS: tuple[tuple[str, int, int, str, tuple[str, ...]], ...] = (
    ("f2x2", 3, 3, "strict", ("", "_staged")),
    ("f2x4", 3, 3, "strict", ("", "_staged")),
    ("f4x4", 3, 3, "default", ("", "_staged", "_lean")),
    ("f6x6", 3, 3, "fast", ("",)),
    ("f2x2", 5, 5, "default", ("", "_staged")),
    ("f4x4", 5, 5, "fast", ("", "_staged")),
    ("f2x2", 7, 7, "fast", ("", "_staged")),
    ("f4", 1, 3, "strict", ("_staged",)),
    ("f4", 3, 1, "strict", ("_staged",)),
    ("f4", 1, 7, "default", ("",)),
    ("f4", 7, 1, "default", ("",)),
    ("f6", 1, 7, "fast", ("", "_staged")),
    ("f6", 7, 1, "fast", ("", "_staged")),
)

for _tile, _kh, _kw, _accuracy, _schedules in _ROWS:
    for _schedule in _schedules:
        register(
            KernelPrimitive(
                f"winograd_{_tile}_{_kh}x{_kw}{_schedule}_nhwc",
                "winograd",
                Layout.NHWC,
                Layout.NHWC,
                (only(_kh, _kw), dense, ungrouped),
                _accuracy,
                _BOUNDS[_accuracy],
            )
        )
