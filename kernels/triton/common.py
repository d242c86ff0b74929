"""What kernels share: pixels, activations, the end of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, alpha, beta, ACT: tl.constexpr):
    """f32; ACT counts as `primitive.ACTIVATIONS` does. NaN stays NaN."""
    if ACT == 1:  # relu
        x = tl.maximum(x, 0.0, propagate_nan=NAN)
    elif ACT == 2:  # clamp
        x = tl.minimum(tl.maximum(x, alpha, propagate_nan=NAN), beta, propagate_nan=NAN)
    elif ACT == 3:  # leaky_relu
        x = tl.where(x > 0, x, alpha * x)
    elif ACT == 4:  # silu
        x = x * sigmoid(x)
    elif ACT == 5:  # sigmoid
        x = sigmoid(x)
    elif ACT == 6:  # hardswish
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0, propagate_nan=NAN), 6.0, propagate_nan=NAN) * (1.0 / 6.0)
    elif ACT == 7:  # hardsigmoid
        x = tl.minimum(tl.maximum(x + 3.0, 0.0, propagate_nan=NAN), 6.0, propagate_nan=NAN) * (1.0 / 6.0)
    elif ACT == 8:  # gelu
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 9:  # gelu_tanh: (1 + tanh(y)) / 2 = sigmoid(2 y)
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def finish(x, dst, offsets, mask, bias, channels, channels_mask, residual, alpha, beta, ACT: tl.constexpr):
    """Stores activation(x + bias + residual): x f32, `channels` an index into bias that broadcasts with it."""
    if bias is not None:
        x += tl.load(bias + channels, mask=channels_mask, other=0.0).to(tl.float32)
    if residual is not None:
        x += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dst + offsets, activate(x, alpha, beta, ACT).to(dst.dtype.element_ty), mask=mask)


@triton.jit
def split_index(index, height, width):
    """(n, y, x) of index = (n * height + y) * width + x."""
    line = index // width
    n = line // height
    return n, line - n * height, index - line * width


@triton.jit
def source_pixel(n, y, x, ih, iw):
    """The index of a pixel of src, 64 bits, and whether it is one or padding."""
    inside = (y >= 0) & (y < ih) & (x >= 0) & (x < iw)
    return (n.to(tl.int64) * ih + y) * iw + x, inside


@triton.jit
def shifted(y, x, dy, dx, ih, iw):
    """Whether the pixels (y + dy, x + dx) are some of src or padding, and how many pixels after (y, x) they lie."""
    inside = (y + dy >= 0) & (y + dy < ih) & (x + dx >= 0) & (x + dx < iw)
    return inside, dy.to(tl.int64) * iw + dx
