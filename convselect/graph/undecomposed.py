"""Operators that AOTAutograd takes apart before any backend sees them, kept whole.

torch registers Python decompositions of them at the keys of autograd, which tracing goes through whatever
decompositions a backend asks for. Interpolation becomes index arithmetic and gathers, 4 to 150 times slower than ATen's
kernel; the others are listed with what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import DispatchKey
from torch._decomp.decompositions import upsample_compute_output_size
from torch._ops import OpOverload

aten = torch.ops.aten

Kernel = Callable[..., torch.Tensor]

_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
_UPSAMPLES = (
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
    aten.upsample_linear1d,
    aten.upsample_bilinear2d,
    aten.upsample_trilinear3d,
    aten.upsample_bicubic2d,
)
"""Those with antialiasing stay whole by themselves."""


@torch.library.custom_op("convselect::pad_circular", mutates_args=())
def pad_circular(x: torch.Tensor, pad: Sequence[int]) -> torch.Tensor:
    """ATen's, whose writes into slices of the result functionalization makes copies of the whole result."""
    padded: torch.Tensor = aten._pad_circular(x, pad)
    return padded


@pad_circular.register_fake
def _(x: torch.Tensor, pad: Sequence[int]) -> torch.Tensor:
    size = list(x.shape)
    for i in range(len(pad) // 2):
        size[-1 - i] = size[-1 - i] + pad[2 * i] + pad[2 * i + 1]
    return x.new_empty(size)


def _rrelu(
    x: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> torch.Tensor:
    """In inference what it is then; ATen makes room for random slopes all the same."""
    if not training:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    result: torch.Tensor = aten.rrelu.default._op_dk(
        DispatchKey.CompositeImplicitAutograd, x, lower, upper, training, generator
    )
    return result


def _sized(whole: OpOverload) -> Kernel:
    """`aten.upsample_*.vec`, which takes a size or scales, as `whole`, which takes the size."""

    def kernel(x: torch.Tensor, size: Sequence[int] | None, *rest: Any) -> torch.Tensor:
        *align_corners, scales = rest
        size = upsample_compute_output_size(x.size(), size, scales)  # type: ignore[no-untyped-call]
        if any(isinstance(length, int) and length == 0 for length in x.shape):  # torch 2.13 cannot trace it
            memory_format = torch._prims_common.suggest_memory_format(x)
            return x.new_empty((*x.shape[:2], *size)).contiguous(memory_format=memory_format)
        result: torch.Tensor = whole(x, size, *align_corners, *(scales or [None] * (x.dim() - 2)))
        return result

    return kernel


_WHOLE: dict[OpOverload, Kernel | None] = {
    **{packet.default: None for packet in _UPSAMPLES},
    **{packet.vec: _sized(packet.default) for packet in _UPSAMPLES},
    aten.hardshrink.default: None,  # 12 times
    aten.softshrink.default: None,  # 30 times
    aten.dropout.default: None,  # a copy where it does nothing
    aten.rrelu.default: _rrelu,  # twice
    aten._pad_circular.default: pad_circular,  # 4 to 30 times
}
"""What takes the place of torch's decomposition; None for ATen's own kernel."""


@contextmanager
def undecomposed() -> Iterator[None]:
    """Tracing inside keeps these operators. Changes torch's registry, as `torch.export` does for the same purpose:
    Dynamo compiles in one thread at a time.
    """
    before = {operator: dict(operator.py_kernels) for operator in _WHOLE}
    try:
        for operator, kernel in _WHOLE.items():
            for key in _KEYS:
                operator.py_kernels.pop(key, None)
                if kernel is not None:
                    operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator, kernels in before.items():
            operator.py_kernels.clear()
            operator.py_kernels.update(kernels)
            operator._dispatch_cache.clear()
