"""Convolution by the Fourier transform, for large kernels: torch.fft, and a product at each frequency."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from math import log2

import torch
from torch.nn import functional as F

from convselect.layout import Layout, dense
from convselect.machine import Machine
from convselect.primitive import Activation, Primitive, register
from convselect.primitives.aten import apply_activation
from convselect.problem import ConvProblem

LEAST_TAPS = 49
"""Below 7x7 the transforms cost more than the multiplications they save."""
_MOST_TILES = 8
"""Along a dimension."""
_COST_CUT, _COST_PRODUCT, _COST_WEIGHT = 1.5, 0.4, 6.0
"""Costs of a transform of tiles that are cut and joined, of a complex multiply-add and of reading a complex weight,
where an element of a transform costs 1 for each bit of the tile's size: from timings on an AMD EPYC of 2 cores."""


@cache
def good_size(least: int) -> int:
    """The least even size from `least` on without prime factors above 7; the transforms of others are slow."""

    def good(n: int) -> bool:
        for factor in (2, 3, 5, 7):
            while n % factor == 0:
                n //= factor
        return n == 1

    return next(n for n in count(least + least % 2, 2) if good(n))


@dataclass(frozen=True)
class Span:
    """One dimension: `tiles` circular convolutions of `size`, each giving `step` outputs (overlap-save).

    A single tile holds src alone: what a tap reads before its begin wraps around to the zeros after its end, so the
    padding of one side is enough. The tiles of several are cut from src with its padding.
    """

    tiles: int
    size: int
    step: int
    offset: int
    """Tap k of output o reads the tile's element (o + k * dilation - offset) mod size."""

    @staticmethod
    def of(tiles: int, source: int, out: int, kernel: int, padding: int, dilation: int) -> Span:
        if tiles == 1:
            return Span(1, good_size(max(source + padding, out)), out, padding)
        size = good_size(-(-out // tiles) + (kernel - 1) * dilation)
        return Span(tiles, size, size - (kernel - 1) * dilation, 0)

    def pad(self, source: int, padding: int) -> tuple[int, int]:
        """Zeros before and after src, for the tiles to cover; negative where the last outputs do not need its end."""
        before = 0 if self.tiles == 1 else padding
        return before, (self.tiles - 1) * self.step + self.size - source - before

    def places(self, kernel: int, dilation: int) -> torch.Tensor:
        """Where each tap goes in the tile of a kernel."""
        return (torch.arange(kernel, device="cpu") * dilation - self.offset) % self.size


@lru_cache(maxsize=1024)
def _spans(p: ConvProblem) -> tuple[Span, Span]:
    """The tiling of least estimated cost."""

    def options(*dimension: int) -> list[Span]:
        spans = (Span.of(tiles, *dimension) for tiles in range(1, _MOST_TILES + 1))
        return [span for span in spans if span.tiles == 1 or span.step * (span.tiles - 1) < dimension[1]]

    def cost(h: Span, w: Span) -> float:
        frequencies, tiles = h.size * w.size / 2, h.tiles * w.tiles
        transforms = 2 * frequencies * tiles * p.mb * (p.ic + p.oc) * log2(h.size * w.size)
        products = frequencies * p.oc * (p.ic // p.g)
        if tiles > 1:
            transforms *= _COST_CUT
        return transforms + (_COST_PRODUCT * tiles * p.mb + _COST_WEIGHT) * products

    pairs = ((h, w) for h in options(p.ih, p.oh, p.kh, p.ph, p.dh) for w in options(p.iw, p.ow, p.kw, p.pw, p.dw))
    return min(pairs, key=lambda pair: cost(*pair))


def _spectrum(tiles: torch.Tensor, h: Span, w: Span) -> torch.Tensor:
    """complex64 [.., w.size // 2 + 1, h.size] of f32 [.., rows, columns], which zeros fill up to the tile.

    By rows first, because rows of zeros need no transform; the result is in the order in which MKL leaves it.
    """
    planes: torch.Tensor = torch.fft.fft(torch.fft.rfft(tiles, n=w.size), n=h.size, dim=-2)
    return planes.transpose(-1, -2)


class Fft(Primitive):
    """dst^[o] = sum over c of src^[c] conj(weight^[o, c]) at each frequency of each tile.

    packed  f32 [g, ic/g, frequencies, 2] where a group is one channel in and out,
            else f32 [frequencies * g, ic/g, oc/g, 2]; frequencies = (w.size // 2 + 1) * h.size

    As exact as direct convolution on the whole, but not "strict": each error is relative to its tile's norm.
    """

    name, family = "fft_nchw", "fft"
    src_layout = dst_layout = Layout.NCHW
    accuracy = "default"
    error_bound = 2e-6

    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        p = problem
        if p.kh * p.kw < LEAST_TAPS:
            return f"fewer than {LEAST_TAPS} taps are not worth the transforms (kh={p.kh}, kw={p.kw})"
        return None if p.sh == p.sw == 1 else f"only stride 1 is supported (sh={p.sh}, sw={p.sw})"

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        p, (h, w) = problem, _spans(problem)
        tiles, frequencies = p.mb * h.tiles * w.tiles, h.size * (w.size // 2 + 1)
        return 8 * tiles * frequencies * 2 * (p.ic + p.oc)

    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        p, (h, w) = problem, _spans(problem)
        return 8 * h.size * (w.size // 2 + 1) * p.oc * (p.ic // p.g)

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        p, (h, w) = problem, _spans(problem)
        places = h.places(p.kh, p.dh)[:, None] * w.size + w.places(p.kw, p.dw)
        tile = weight.new_zeros(p.oc, p.ic // p.g, h.size * w.size)
        tile.index_add_(2, places.flatten(), weight.detach().flatten(2))
        spectrum = _spectrum(tile.view(p.oc, -1, h.size, w.size), h, w).conj().resolve_conj()
        if p.ic == p.oc == p.g:
            return torch.view_as_real(spectrum).reshape(p.g, 1, -1, 2)
        spectrum = spectrum.reshape(p.g, p.oc // p.g, p.ic // p.g, -1).permute(3, 0, 2, 1).contiguous()
        return torch.view_as_real(spectrum).flatten(0, 1)

    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        p, (h, w) = problem, _spans(problem)
        mb, tiles, weight = src.shape[0], h.tiles * w.tiles, torch.view_as_complex(packed)
        if tiles > 1:
            src = F.pad(src, (*w.pad(p.iw, p.pw), *h.pad(p.ih, p.ph)))
            src = src.unfold(2, h.size, h.step).unfold(3, w.size, w.step)
        spectrum = _spectrum(src, h, w)
        if p.ic == p.oc == p.g:
            spectrum = spectrum.reshape(mb, p.g, tiles, -1).mul_(weight)
        else:
            rows = spectrum.reshape(mb, p.g, p.ic // p.g, tiles, -1).permute(4, 1, 0, 3, 2)
            rows = rows.reshape(-1, mb * tiles, p.ic // p.g).contiguous()  # else bmm copies one matrix at a time
            product = torch.bmm(rows, weight)
            spectrum = product.view(-1, p.g, mb, tiles, p.oc // p.g).permute(2, 1, 4, 3, 0)
        columns = torch.fft.ifft(spectrum.reshape(mb, p.oc, h.tiles, w.tiles, -1, h.size))[..., : h.step]
        outputs = torch.fft.irfft(columns.transpose(-1, -2), n=w.size)[..., : w.step]
        whole = outputs.transpose(3, 4).reshape(mb, p.oc, h.tiles * h.step, w.tiles * w.step)
        dst = dense(whole[:, :, : p.oh, : p.ow], self.dst_layout)
        if bias is not None:
            dst += bias[:, None, None]
        if residual is not None:
            dst += residual
        return apply_activation(dst, activation)


register(Fft())
