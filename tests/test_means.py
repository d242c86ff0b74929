"""Global averages: as exact as eager's on maps of any size, in either layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convselect
from convselect.costs import Costs
from convselect.graph.program.segment import Segment
from convselect.layout import Layout
from convselect.runtime.compiled import run_graphs

aten = torch.ops.aten


class Net(nn.Module):
    """The activation between the convolution and the mean is an operator of its own, so that the layout is free."""

    def __init__(self, keepdim: bool) -> None:
        super().__init__()
        self.conv, self.keepdim = nn.Conv2d(3, 8, 1), keepdim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.conv(x)).mean((2, 3), keepdim=self.keepdim)


def picture(size: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def constant(size: int) -> torch.Tensor:
    return torch.full((1, 3, size, size), 0.3)


def operators(fast: object, x: torch.Tensor) -> set[object]:
    """What the graphs call, those in programs too."""
    targets = [node.target for run in run_graphs(fast, [x]) for node in run.graph.module.graph.nodes]
    inside = [node.target for segment in targets if isinstance(segment, Segment) for node in segment.nodes]
    return {target for target in (*targets, *inside) if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("accuracy", ["strict", "default"])
@pytest.mark.parametrize("image", [constant, picture])
@pytest.mark.parametrize("size", [56, 1024])
@torch.inference_mode()
def test_as_exact_as_the_model(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, accuracy: str, image, size: int
) -> None:
    def operator_ms(self: Costs, key: str, nbytes: float) -> float:
        return 0.0 if key.endswith(f".{layout}") else 1e3

    monkeypatch.setattr(Costs, "operator_ms", operator_ms)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net(keepdim=size == 56).eval()
    fast = convselect.compile(model, calibrate="never", strict=True, accuracy=accuracy)
    x = image(size)
    got, want = fast(x), model.double()(x.double())
    ours, torchs = torch.ops.convselect.pool2d.default, aten.mean.dim
    model.float()
    assert operators(fast, x) & {ours, torchs} == {ours if layout is Layout.NHWC else torchs}
    assert ((got - want) / want).abs().max() <= 1e-6  # with the errors of the convolution and the sigmoid
