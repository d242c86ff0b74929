"""Half of the blocks of `zoo_blocks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3(ic: int, oc: int, stride: int = 1, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(ic, oc, 3, stride, 1, **more)


class ResidualNorm(nn.Module):
    """GroupNorm, SiLU and convolution, twice, with an embedding added between and a 1x1 shortcut: as in diffusers."""

    def __init__(self, ic: int, oc: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, ic), nn.GroupNorm(4, oc)
        self.conv1, self.conv2 = conv3(ic, oc), conv3(oc, oc)
        self.project = nn.Linear(embedding, oc) if embedding else None
        self.shortcut = nn.Conv2d(ic, oc, 1) if ic != oc else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.project is not None:
            h = h + self.project(F.silu(embedding))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Over the pixels, between 1x1 convolutions."""

    def __init__(self, channels: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).reshape(n, self.heads, -1, h * w).transpose(2, 3) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(2, 3).reshape(n, c, h, w))


class Upsample(nn.Module):
    def __init__(self, ic: int, oc: int) -> None:
        super().__init__()
        self.conv = conv3(ic, oc)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VaeDecoder(nn.Sequential):
    """Of latents [n, 4, h, w]: pictures [n, 3, 4h, 4w]."""

    def __init__(self, c: int = 32) -> None:
        super().__init__(
            nn.Conv2d(4, 4, 1), conv3(4, 2 * c), ResidualNorm(2 * c, 2 * c), Attention(2 * c),
            ResidualNorm(2 * c, 2 * c), Upsample(2 * c, 2 * c), ResidualNorm(2 * c, c), Upsample(c, c),
            ResidualNorm(c, c), nn.GroupNorm(4, c), nn.SiLU(), conv3(c, 3),
        )  # fmt: skip


class DiffusionUnet(nn.Module):
    """Takes noisy latents and the time step of each, int64 [n]."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(c, 2 * c), nn.SiLU(), nn.Linear(2 * c, 2 * c))
        self.stem = conv3(4, c)
        self.down1, self.reduce = ResidualNorm(c, c, 2 * c), conv3(c, c, 2)
        self.down2, self.attention2 = ResidualNorm(c, 2 * c, 2 * c), Attention(2 * c, heads=4)
        self.middle = ResidualNorm(2 * c, 2 * c, 2 * c)
        self.up2, self.widen = ResidualNorm(4 * c, c, 2 * c), Upsample(c, c)
        self.up1 = ResidualNorm(2 * c, c, 2 * c)
        self.head = nn.Sequential(nn.GroupNorm(4, c), nn.SiLU(), conv3(c, 4))
        self.c = c

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        frequency = torch.exp(-9.2 * torch.arange(self.c // 2, dtype=x.dtype) / (self.c // 2))
        angle = step[:, None].to(x.dtype) * frequency
        t = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        a = self.down1(self.stem(x), t)
        b = self.attention2(self.down2(self.reduce(a), t))
        h = self.up2(torch.cat([self.middle(b, t), b], dim=1), t)
        return self.head(self.up1(torch.cat([self.widen(h), a], dim=1), t))


class PixelShuffleSr(nn.Module):
    """EDSR: residual blocks without norms, scaled, then pixel shuffle."""

    def __init__(self, c: int = 32, blocks: int = 3) -> None:
        super().__init__()
        self.head = conv3(3, c)
        self.body = nn.ModuleList(nn.Sequential(conv3(c, c), nn.ReLU(), conv3(c, c)) for _ in range(blocks))
        self.tail = nn.Sequential(conv3(c, 4 * c), nn.PixelShuffle(2), conv3(c, 3))

    def forward(self, x: Tensor) -> Tensor:
        first = h = self.head(x - 0.45)
        for block in self.body:
            h = h + 0.1 * block(h)
        return self.tail(h + first) + 0.45


class DenseRestoration(nn.Module):
    """ESRGAN's residual in residual dense blocks: concatenations, leaky ReLU, nearest upsampling."""

    def __init__(self, c: int = 32, growth: int = 16) -> None:
        super().__init__()
        self.head = conv3(3, c)
        self.dense = nn.ModuleList(conv3(c + i * growth, growth if i < 4 else c) for i in range(5))
        self.up, self.tail = conv3(c, c), conv3(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.head(x)]
        for conv in self.dense[:-1]:
            parts.append(F.leaky_relu(conv(torch.cat(parts, 1)), 0.2))
        h = self.dense[-1](torch.cat(parts, 1)) * 0.2 + parts[0]
        h = F.leaky_relu(self.up(F.interpolate(h, scale_factor=2, mode="nearest")), 0.2, inplace=True)
        return self.tail(h)


class LayerNorm2d(nn.Module):
    """Over the channels of each pixel, by hand."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / (var + 1e-6).sqrt()
        return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)


class NafBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(c), LayerNorm2d(c)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(c, 2 * c, 1),
            conv3(2 * c, 2 * c, groups=2 * c),
            nn.Conv2d(c, c, 1),
        )
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.conv4, self.conv5 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, c, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv2(self.conv1(self.norm1(x))).chunk(2, dim=1)
        y = x + self.conv3(a * b * self.attention(a * b)) * self.beta
        a, b = self.conv4(self.norm2(y)).chunk(2, dim=1)
        return y + self.conv5(a * b) * self.gamma


class NafNet(nn.Module):
    """Restoration without activations: gates by products, downscaling by stride, upscaling by pixel shuffle."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.head, self.tail = conv3(3, c), conv3(c, 3)
        self.outer, self.inner, self.last = NafBlock(c), NafBlock(2 * c), NafBlock(c)
        self.down = nn.Conv2d(c, 2 * c, 2, 2)
        self.up = nn.Sequential(nn.Conv2d(2 * c, 4 * c, 1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        a = self.outer(self.head(x))
        return x + self.tail(self.last(a + self.up(self.inner(self.down(a)))))


class ConvLstm(nn.Module):
    """One step: (x, (h, c)) -> (h, (h, c)); the state's four gates are one convolution."""

    def __init__(self, ic: int = 8, c: int = 24) -> None:
        super().__init__()
        self.gates = conv3(ic + c, 4 * c)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        i, f, o, g = torch.split(self.gates(torch.cat([x, h], dim=1)), h.shape[1], dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


class DoubleConv(nn.Sequential):
    def __init__(self, ic: int, oc: int) -> None:
        super().__init__(
            conv3(ic, oc, bias=False), nn.BatchNorm2d(oc), nn.ReLU(inplace=True),
            conv3(oc, oc, bias=False), nn.BatchNorm2d(oc), nn.ReLU(inplace=True),
        )  # fmt: skip


class BilinearUnet(nn.Module):
    """Upsamples with aligned corners and pads to the size of what it is concatenated with, which is odd."""

    def __init__(self, c: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.down = nn.ModuleList([DoubleConv(3, c), DoubleConv(c, 2 * c), DoubleConv(2 * c, 2 * c)])
        self.up = nn.ModuleList([DoubleConv(4 * c, c), DoubleConv(2 * c, c)])
        self.head = nn.Conv2d(c, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.down[0](x)]
        for block in self.down[1:]:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        h = skips.pop()
        for block in self.up:
            skip = skips.pop()
            h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)
            dh, dw = skip.shape[2] - h.shape[2], skip.shape[3] - h.shape[3]
            h = block(torch.cat([skip, F.pad(h, [dw // 2, dw - dw // 2, dh // 2, dh - dh // 2])], dim=1))
        return self.head(h)


class Aspp(nn.Module):
    """DeepLab's pyramid: dilated branches and a global one brought to their size."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv3(3, c, 2, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=rate, dilation=rate, bias=False), nn.BatchNorm2d(c), nn.ReLU())
            for rate in (1, 6, 12)
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(4 * c, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.stem(x)
        whole = F.interpolate(self.pool(h), size=h.shape[-2:], mode="bilinear", align_corners=False)
        h = self.project(torch.cat([*(branch(h) for branch in self.branches), whole], dim=1))
        return {"out": F.interpolate(h, size=x.shape[-2:], mode="bilinear", align_corners=False), "features": h}
