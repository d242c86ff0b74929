"""Small networks of the zoo that are no library's: the parts of diffusion, restoration, detection and recurrent models.

`BLOCKS` has for each its module and its input for a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from zoo_parts import (
    Aspp,
    BilinearUnet,
    ConvLstm,
    DenseRestoration,
    DiffusionUnet,
    DoubleConv,
    NafNet,
    PixelShuffleSr,
    VaeDecoder,
    conv3,
)


class ConvNorm(nn.Sequential):
    def __init__(self, ic: int, oc: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(ic, oc, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(oc), nn.SiLU(inplace=True)
        )


class Csp(nn.Module):
    """Half of the channels through bottlenecks, all parts concatenated: YOLO's C2f."""

    def __init__(self, ic: int, oc: int) -> None:
        super().__init__()
        self.first, self.last = ConvNorm(ic, oc, 1), ConvNorm(2 * oc, oc, 1)
        self.inner = nn.ModuleList(
            nn.Sequential(ConvNorm(oc // 2, oc // 2), ConvNorm(oc // 2, oc // 2)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.inner:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Backbone, SPPF, a path down by nearest upsampling, and heads: boxes from a distribution of distances, classes."""

    BINS, CLASSES = 8, 10

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, c, 3, 2), ConvNorm(c, 2 * c, 3, 2), Csp(2 * c, 2 * c))
        self.deep = nn.Sequential(ConvNorm(2 * c, 4 * c, 3, 2), Csp(4 * c, 4 * c))
        self.squeeze, self.spread = ConvNorm(4 * c, 2 * c, 1), ConvNorm(8 * c, 4 * c, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.fuse = Csp(6 * c, 2 * c)
        self.boxes = nn.ModuleList(
            nn.Sequential(ConvNorm(n, 16), nn.Conv2d(16, 4 * self.BINS, 1)) for n in (2 * c, 4 * c)
        )
        self.scores = nn.ModuleList(
            nn.Sequential(ConvNorm(n, 16), nn.Conv2d(16, self.CLASSES, 1)) for n in (2 * c, 4 * c)
        )
        self.expect = nn.Conv2d(self.BINS, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        small = self.stem(x)
        pooled = [self.squeeze(self.deep(small))]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        deep = self.spread(torch.cat(pooled, 1))
        small = self.fuse(torch.cat([F.interpolate(deep, scale_factor=2.0), small], 1))
        found = []
        for box, score, features in zip(self.boxes, self.scores, (small, deep), strict=True):
            n, _, h, w = features.shape
            bins = box(features).view(n, 4, self.BINS, h * w).transpose(1, 2).softmax(1)
            side = self.expect(bins).view(n, 4, h * w)
            y, x_ = torch.meshgrid(torch.arange(h, dtype=x.dtype), torch.arange(w, dtype=x.dtype), indexing="ij")
            centre = torch.stack([x_, y]).view(1, 2, -1) + 0.5
            corners = torch.cat([centre - side[:, :2], centre + side[:, 2:]], 1) * (x.shape[-1] // w)
            found.append(torch.cat([corners, score(features).view(n, -1, h * w).sigmoid()], 1))
        return torch.cat(found, 2).permute(0, 2, 1)


class SqueezeExcite(nn.Module):
    """The original form, by a view of a matrix, and a gate over the pixels (CBAM)."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.stem = conv3(3, c)
        self.fc = nn.Sequential(nn.Linear(c, c // 4), nn.ReLU(), nn.Linear(c // 4, c), nn.Sigmoid())
        self.pixels = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c = x.shape[:2]
        x = x * self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1)
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.pixels(both))


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


class Valid(nn.Module):
    """A port from TensorFlow: "valid" and "same" paddings, and an asymmetric one before a stride."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, c, 3, padding="valid"), nn.Conv2d(c, c, (5, 3), padding="same")
        self.c, self.d = nn.Conv2d(c, c, 3, stride=2), nn.Conv2d(c, c, 3, padding="valid", dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu6(self.norm(self.c(F.pad(F.relu(self.b(self.a(x))), (0, 1, 0, 1))))))


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
            nn.ConvTranspose2d(24, 2 * c, 4, 1, 0, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU(True),
            nn.ConvTranspose2d(2 * c, c, 4, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(True),
        )  # fmt: skip
        self.out = conv3(c, 3)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.out(self.up(z)))


class SegNet(nn.Module):
    """Unpools by the indices of its max pooling."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.down, self.inner, self.up = DoubleConv(3, c), DoubleConv(c, c), DoubleConv(c, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, indices = F.max_pool2d(self.down(x), 2, return_indices=True)
        return self.up(F.max_unpool2d(self.inner(h), indices, 2))


class Parametrised(nn.Module):
    """Weights that are computed from parameters: weight norm, spectral norm, a mask, standardisation."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.a, self.b = weight_norm(conv3(3, c)), spectral_norm(conv3(c, c))
        self.masked, self.standard = conv3(c, c), conv3(c, c)
        self.register_buffer("mask", torch.ones(3, 3).tril(-1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.b(F.relu(self.a(x))))
        h = F.conv2d(h, self.masked.weight * self.mask, self.masked.bias, padding=1)
        var, mean = torch.var_mean(self.standard.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(h, (self.standard.weight - mean) * torch.rsqrt(var + 1e-5), self.standard.bias, padding=1)


class SpatialTransformer(nn.Module):
    """Samples its input where a small network says."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(conv3(3, 8, 2), nn.ReLU(), conv3(8, 8, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.affine, self.out = nn.Linear(8, 6), conv3(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.affine(self.where(x).flatten(1)).view(-1, 2, 3)
        return self.out(F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False))


class Wave(nn.Module):
    """Convolutions over time, dilated and gated, then over frequencies of its spectrogram."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, c, 1)
        self.layers = nn.ModuleList(nn.Conv1d(c, 2 * c, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.picture = nn.Conv2d(1, 8, (3, 5), padding=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for conv in self.layers:
            a, b = conv(h).chunk(2, dim=1)
            h = h + torch.tanh(a) * torch.sigmoid(b)
        return self.picture(h.unsqueeze(1)).square().mean(1)


def picture(side: int, channels: int = 3) -> Callable[[int], tuple[Any, ...]]:
    return lambda batch: (torch.randn(batch, channels, side, side),)


def lstm_input(batch: int) -> tuple[Any, ...]:
    return torch.randn(batch, 8, 16, 20), (torch.randn(batch, 24, 16, 20), torch.randn(batch, 24, 16, 20))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]]]] = {
    "vae_decoder": (VaeDecoder, picture(16, 4)),
    "diffusion_unet": (DiffusionUnet, lambda batch: (torch.randn(batch, 4, 16, 16), torch.arange(batch) * 7 + 3)),
    "pixel_shuffle_sr": (PixelShuffleSr, picture(32)),
    "dense_restoration": (DenseRestoration, picture(32)),
    "nafnet": (NafNet, picture(32)),
    "conv_lstm": (ConvLstm, lstm_input),
    "bilinear_unet": (BilinearUnet, picture(45)),
    "aspp": (Aspp, picture(65)),
    "yolo": (Yolo, picture(64)),
    "squeeze_excite": (SqueezeExcite, picture(24)),
    "modulated_conv": (ModulatedConv, lambda batch: (torch.randn(batch, 3, 16, 16), torch.randn(batch, 12))),
    "valid_padding": (Valid, picture(33)),
    "style_transfer": (StyleTransfer, picture(40)),
    "transposed": (Transposed, picture(1, 24)),
    "segnet": (SegNet, picture(32)),
    "parametrised": (Parametrised, picture(24)),
    "spatial_transformer": (SpatialTransformer, picture(32)),
    "wave": (Wave, lambda batch: (torch.randn(batch, 1, 128),)),
}
"""Name -> module, and its arguments for a batch, of random numbers."""
