"""The least time a network can take on a GPU: layer by layer, its FLOPs at the rate of a large matrix product or its
bytes at the rate of a copy, whichever is longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from convselect.bench.networks import executed, side_of


class Layer(NamedTuple):
    """A convolution or a linear layer: operations of the direct algorithm, elements read and written once."""

    flops: int
    elements: int


def layers(name: str, batch: int) -> list[Layer]:
    """Of torchvision's network `name`, in order of execution. Nothing is computed."""
    found = []
    for module, src, dst in executed(name, side_of(name), batch):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        flops = 2 * dst.numel() * math.prod(weight.shape[1:])
        found.append(Layer(flops, src.numel() + dst.numel() + weight.numel()))
    return found


def floor_ms(network: Iterable[Layer], precision: str, ceilings: Mapping[str, float]) -> float:
    """Milliseconds; `ceilings` has "copy_gbs" and, for each precision, "float16_tflops" and so on."""
    size = 2 if precision in ("float16", "bfloat16") else 4
    flops_ms, bytes_ms = 1e-9 / ceilings[f"{precision}_tflops"], 1e-6 / ceilings["copy_gbs"]
    return sum(max(layer.flops * flops_ms, size * layer.elements * bytes_ms) for layer in network)
