"""Writes into parts: in place where nobody reads what was there, else a copy. The results are eager's in both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from behaviour import check
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from convselect.backend import Backend
from convselect.options import Options
from convselect.runtime.compiled import CompiledGraph


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], object], of_input: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function, self.of_input = nn.Conv2d(4, 4, 3, padding=1), function, of_input

    def forward(self, x: Tensor) -> object:
        return self.function(self.conv(self.of_input(x)))


def attention(x: Tensor) -> Tensor:
    scores = x @ x.transpose(2, 3)
    scores[:, :, 1:, 1:] += x[:, :, 1:, 1:]
    return scores.softmax(-1)


def preallocated(x: Tensor) -> Tensor:
    result = torch.zeros(4, *x.shape)
    for i in range(4):
        result[i] = x * i
    result[..., ::2, 1:3] = 5
    return result


def parts_of_parts(x: Tensor) -> Tensor:
    y = x.tanh()
    y[:, 1:3][:, :, 2:].select(3, 1).mul_(2)
    y.permute(1, 0, 3, 2)[2:3].neg_()
    y.diagonal(0, 2, 3).fill_(3)
    y.view(x.shape[0], -1)[:, :5].add_(1)
    return y


def by_index(x: Tensor) -> Tensor:
    y = x.exp()
    y[:, torch.tensor([0, 2])] = 0
    y[y > 2] = 1
    y.index_add_(1, torch.tensor([1]), x[:, :1]).masked_fill_(x < 0, -1)
    return y.scatter_(3, torch.zeros_like(x, dtype=torch.int64), 0.5)


def of_another_type(x: Tensor) -> Tensor:
    y = x.tanh()
    y[:, :2] = (x[:, :2] > 0).to(torch.int32)
    y[:, 2:] += x[:, 2:].double()
    return y


def a_broadcast(x: Tensor) -> Tensor:
    y = x.tanh()
    y[:, 1:] = x[:, :1]
    return y


def moved(x: Tensor) -> Tensor:
    y = x.tanh()
    y[:, 1:] = y[:, :-1].clone()
    y[:, :1] += y[:, 1:2]
    return y


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    y, z = x.tanh(), x.cos()
    y[:, 0] += z[:, 1]
    z[:, 0] += y[:, 1]
    return y, z


def copied_before(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.tanh()
    before = y.clone()
    y[:, 1:] *= 2
    return y, before


@pytest.mark.parametrize(
    "function",
    [attention, preallocated, parts_of_parts, by_index, of_another_type, a_broadcast, moved, twice, copied_before],
    ids=lambda function: function.__name__,
)
def test_in_place(function: Callable[[Tensor], object]) -> None:
    """No operator is left that copies the whole to change a part."""
    assert not copies_left(function)


def read_later(x: Tensor) -> Tensor:
    y = x.tanh()
    z = torch.slice_scatter(y, y[:, 1:] * 2, 1, 1)
    return y.sin() + z


def returned_beside(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.tanh()
    return y, y.masked_fill(y < 0, 2)


def a_view_read_later(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.tanh()
    part = y[:, :1]
    return torch.slice_scatter(y, x[:, 1:], 1, 1), part.neg()


def part_of_itself(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.tanh()
    return y, torch.slice_scatter(y, y[:, 1:], 1, 1)


def expanded(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True).expand(-1, 4, -1, -1).masked_fill(x < 0, 2)


def moved_with_overlap(x: Tensor) -> Tensor:
    y = x.tanh()
    return torch.slice_scatter(y, y[:, :-1], 1, 1)


def a_view_of_the_part(x: Tensor) -> Tensor:
    y = x.tanh().view(-1, 6)
    return torch.slice_scatter(y, y[1:7].t(), 0, 1, 7)


@pytest.mark.parametrize(
    "function",
    [read_later, returned_beside, a_view_read_later, part_of_itself, expanded, moved_with_overlap, a_view_of_the_part],
    ids=lambda function: function.__name__,
)
def test_copies_that_are_needed(function: Callable[[Tensor], object]) -> None:
    assert copies_left(function)


def test_an_input_is_copied() -> None:
    assert copies_left(lambda x: x, of_input=lambda x: x.masked_fill(x < 0, 2))


@torch.inference_mode()
def copies_left(function: Callable[[Tensor], object], of_input: Callable[[Tensor], Tensor] = lambda x: x) -> list[str]:
    """The operators left in the graph that copy a tensor to change a part; results are checked for two batches."""
    torch._dynamo.reset()
    graphs: list[CompiledGraph] = []

    def held(graph: CompiledGraph) -> CompiledGraph:
        graphs.append(graph)
        return graph

    model = Written(function, of_input)
    fast = torch.compile(model, backend=Backend(Options(calibrate="never"), held))
    for batch in (2, 3):
        check(model, [torch.randn(batch, 4, 6, 6)], fast, lambda: torch.compile(model, backend=aot_eager))
    names = [str(node.target) for graph in graphs for node in graph.module.graph.nodes]
    operators = ("scatter.", "index_put.", "index_add.", "masked_fill.", "aten.copy.")
    return [name for name in names if name.startswith("aten.") and any(each in name for each in operators)]
