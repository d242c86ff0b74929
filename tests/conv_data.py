"""Inputs of a convolution, its result in float64, and a run of a primitive that notices what it writes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from convselect.layout import Layout, strides
from convselect.machine import cpu
from convselect.primitive import ACTIVATIONS, IDENTITY, Activation, Primitive
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem


class Data:
    """Inputs of a problem and its convolution in float64: normal with He weights, or small integers."""

    def __init__(self, p: ConvProblem, integers: bool = False, seed: int = 0) -> None:
        random_ = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            if integers:
                return torch.randint(-3, 4, size, generator=random_).float()
            return torch.randn(size, generator=random_)

        k = p.ic // p.g * p.kh * p.kw
        self.src, self.weight = draw(p.mb, p.ic, p.ih, p.iw), draw(p.oc, p.ic // p.g, p.kh, p.kw)
        if not integers:
            self.weight *= (2 / k) ** 0.5
        self.bias, self.residual = draw(p.oc), draw(p.mb, p.oc, p.oh, p.ow)
        self.conv = self.convolve(p, self.src)

    def convolve(self, p: ConvProblem, src: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(src.double(), self.weight.double(), None, (p.sh, p.sw), (p.ph, p.pw), (p.dh, p.dw), p.g)

    @property
    def sum(self) -> torch.Tensor:
        return self.conv + self.bias.double()[:, None, None] + self.residual


def activation_of(kind: str) -> Activation:
    return Activation(kind, *{"clamp": (-0.5, 1.5), "leaky_relu": (0.1, 0.0)}.get(kind, (0.0, 0.0)))


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    kind, alpha, beta = activation
    return {
        "identity": lambda: x,
        "relu": lambda: F.relu(x),
        "clamp": lambda: x.clamp(alpha, beta),
        "leaky_relu": lambda: F.leaky_relu(x, alpha),
        "silu": lambda: F.silu(x),
        "sigmoid": lambda: x.sigmoid(),
        "hardswish": lambda: F.hardswish(x),
        "hardsigmoid": lambda: F.hardsigmoid(x),
        "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
    }[kind]()


def to(x: torch.Tensor, layout: object) -> torch.Tensor:
    """`x` dense in `layout`, with its exact strides."""
    return x.new_empty_strided(x.shape, strides(x.shape, layout)).copy_(x)


QUIET_NAN, GARBAGE = 0x7FC00000, 0xA5A5A5A5 - 2**32


class Guarded:
    """A buffer between two guard regions. `pattern`, an int32, fills all of it."""

    GUARD = 1024

    def __init__(self, floats: int, pattern: int) -> None:
        self.pattern = pattern
        self.whole = torch.full((floats + 2 * self.GUARD,), pattern, dtype=torch.int32)
        self.inner = self.whole[self.GUARD : self.GUARD + floats].view(torch.float32)

    def intact(self) -> bool:
        return all(bool((end == self.pattern).all()) for end in (self.whole[: self.GUARD], self.whole[-self.GUARD :]))


def run(
    primitive: Primitive,
    p: ConvProblem,
    src: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation = IDENTITY,
    wider: int = 0,
) -> torch.Tensor:
    """One run; a kernel of our own between guards, on a dst of NaN and a workspace of garbage.

    With `wider`, an NHWC dst of a kernel is the first channels of a tensor that has so many more.
    """
    src = to(src, primitive.src_layout)
    residual = None if residual is None else to(residual, primitive.dst_layout)
    weight = weight.clone()
    packed = primitive.prepack(p, weight)
    weight.fill_(float("nan"))  # packed must not alias it
    size = (src.shape[0], p.oc, p.oh, p.ow)
    if not isinstance(primitive, KernelPrimitive):
        dst = primitive.run(p, activation, src, packed, bias, residual)
        assert dst.stride() == strides(size, primitive.dst_layout), f"{primitive.name} returned strides {dst.stride()}"
        return dst
    kind, alpha, beta = activation
    pixels, stride = size[0] * p.oh * p.ow, p.oc + (wider if primitive.dst_layout is Layout.NHWC else 0)
    buffer = Guarded(pixels * stride, QUIET_NAN)
    workspace = Guarded(primitive.workspace_bytes(p.with_batch(size[0]), cpu()) // 4, GARBAGE)
    dst = buffer.inner.as_strided(
        size, strides((size[0], stride, p.oh, p.ow), primitive.dst_layout), buffer.inner.storage_offset()
    )
    torch.ops.convselect.conv_out(
        dst,
        workspace.inner,
        src,
        packed,
        bias,
        residual,
        primitive.kernel,
        p.geometry,
        ACTIVATIONS.index(kind),
        alpha,
        beta,
    )
    between = buffer.inner.view(torch.int32).view(pixels, stride)[:, p.oc :] if stride > p.oc else torch.empty(0)
    assert buffer.intact(), f"{primitive.name} wrote outside dst"
    assert bool((between == QUIET_NAN).all()), f"{primitive.name} wrote between the pixels of dst"
    assert workspace.intact(), f"{primitive.name} wrote outside its workspace"
    return dst


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Rel-L2. Values are of order 1: the floor keeps a few outputs that cancel from counting as a large error."""
    return float((got.double() - want).norm() / max(float(want.norm()), 0.5 * want.numel() ** 0.5))
