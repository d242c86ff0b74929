"""Small networks of the zoo that make pictures: parts of diffusion models, restoration, generators."""

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
            nn.Conv2d(4, 4, 1),
            conv3(4, 2 * c),
            ResidualNorm(2 * c, 2 * c),
            Attention(2 * c),
            ResidualNorm(2 * c, 2 * c),
            Upsample(2 * c, 2 * c),
            ResidualNorm(2 * c, c),
            Upsample(c, c),
            ResidualNorm(c, c),
            nn.GroupNorm(4, c),
            nn.SiLU(),
            conv3(c, 3),
        )


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


class ModulatedConv(nn.Module):
    """StyleGAN2: the weight depends on the call, one for each image, as groups."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.stem, self.out = conv3(3, c), nn.Conv2d(c, 3, 1)
        self.style, self.weight = nn.Linear(12, c), nn.Parameter(torch.randn(1, c, c, 3, 3))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        weight = self.weight * self.style(style).view(n, 1, c, 1, 1)
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.reshape(1, n * c, h, w), weight.view(n * c, c, 3, 3), padding=1, groups=n)
        return self.out(F.leaky_relu(y.view(n, c, h, w), 0.2))


class StyleTransfer(nn.Module):
    """Reflection padding, instance norms, and sizes given by another tensor."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, c, 9), nn.Conv2d(c, 2 * c, 3, 2)
        self.norm1, self.norm2 = nn.InstanceNorm2d(c, affine=True), nn.InstanceNorm2d(2 * c, affine=True)
        self.out = nn.Conv2d(2 * c, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.a(F.pad(x, (4, 4, 4, 4), mode="reflect"))))
        h = F.relu(self.norm2(self.b(F.pad(h, (1, 1, 1, 1), mode="replicate"))))
        return torch.tanh(self.out(F.interpolate(h, size=x.shape[2:], mode="bicubic")))


class Transposed(nn.Module):
    """DCGAN's generator: transposed convolutions, then an ordinary one."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.ConvTranspose2d(24, 2 * c, 4, 1, 0, bias=False),
            nn.BatchNorm2d(2 * c),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * c, c, 4, 2, 1, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU(True),
        )
        self.out = conv3(c, 3)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.out(self.up(z)))
