"""Small networks of the zoo that are no library's. `BLOCKS` has for each its module and its input for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from zoo_pictures import (
    DenseRestoration,
    DiffusionUnet,
    ModulatedConv,
    NafNet,
    PixelShuffleSr,
    StyleTransfer,
    Transposed,
    VaeDecoder,
    conv3,
)


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
            conv3(ic, oc, bias=False),
            nn.BatchNorm2d(oc),
            nn.ReLU(inplace=True),
            conv3(oc, oc, bias=False),
            nn.BatchNorm2d(oc),
            nn.ReLU(inplace=True),
        )


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


class Valid(nn.Module):
    """A port from TensorFlow: "valid" and "same" paddings, and an asymmetric one before a stride."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, c, 3, padding="valid"), nn.Conv2d(c, c, (5, 3), padding="same")
        self.c, self.d = nn.Conv2d(c, c, 3, stride=2), nn.Conv2d(c, c, 3, padding="valid", dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu6(self.norm(self.c(F.pad(F.relu(self.b(self.a(x))), (0, 1, 0, 1))))))


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
