"""A small model that reads all kinds of things, compiled so that repeated calls may be short."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import convselect
from convselect.runtime.shortcut import Shortcut

X = torch.randn(1, 3, 8, 9, generator=torch.Generator().manual_seed(0))
SCALE = 2.0
UNREAD = 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.scale = 1.0
        self.config = {"negate": False}
        self.pair = (1.0, 2.0)

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x))) * self.scale * self.pair[1] * SCALE
        if self.config["negate"]:
            x = -x
        return x + x if twice else x


def compiled(model: nn.Module) -> Callable[..., torch.Tensor]:
    return convselect.compile(model.eval(), calibrate="never")


def shortcuts(fast: Callable[..., torch.Tensor]) -> list[Shortcut | None]:
    return list(fast.__dict__["_shortcuts"]._known.values())


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
