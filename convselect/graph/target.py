"""Where a graph's convolutions run and in which type, which decides the machine that primitives are chosen for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from convselect import machine as machines
from convselect.graph.nodes import args_of
from convselect.machine import Machine

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """The device and type of every convolution of a graph that is converted."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def machine(self) -> Machine:
        return machines.gpu(self.device.index or 0, self.dtype) if self.is_gpu else machines.cpu()

    def refusal(self, what: str, operand: torch.Tensor) -> str | None:
        """Why a convolution with this operand is not converted; None if that is not the reason."""
        if operand.device != self.device:
            return f"the graph's convolutions run on {self.device} (the {what} is on {operand.device})"
        if operand.dtype == self.dtype:
            return None
        if not self.is_gpu:
            return f"only float32 is supported (the {what} is {operand.dtype})"
        if operand.dtype not in GPU_DTYPES:
            return f"only {', '.join(map(str, GPU_DTYPES))} are supported (the {what} is {operand.dtype})"
        return f"the graph's convolutions run in {self.dtype} (the {what} is {operand.dtype})"


def target_of(graph: Graph) -> Target | str:
    """The target of a graph's convolutions, on a GPU of the commonest type; or the sentence why none is converted."""
    sources = [args_of(node)[0].meta["val"] for node in _convolutions(graph)]
    devices = list(dict.fromkeys(source.device for source in sources))
    if len(devices) > 1:
        return f"the graph's convolutions are on several devices ({', '.join(map(str, devices))})"
    other = next(filter(_is_others, devices or devices_of(graph)), None)
    if other is not None:
        maker = {"cuda": " of AMD's", "xpu": " of Intel's"}.get(other.type, "")
        return f"only CPUs and NVIDIA's GPUs are supported (the input is on {other}, a device{maker})"
    if not devices or devices[0].type == "cpu":
        return Target(torch.device("cpu"), torch.float32)
    (device,) = devices
    dtypes = Counter(source.dtype for source in sources if source.dtype in GPU_DTYPES)
    return Target(device, dtypes.most_common(1)[0][0] if dtypes else torch.float32)


def devices_of(graph: Graph) -> list[torch.device]:
    """The devices of all values, in the order of the graph."""
    values = (node.meta.get("val") for node in graph.nodes)
    return list(dict.fromkeys(value.device for value in values if isinstance(value, torch.Tensor)))


def _is_others(device: torch.device) -> bool:
    """Whether kernels of ours run nowhere on such a device."""
    return device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip is not None)


def _convolutions(graph: Graph) -> Iterator[Node]:
    yield from graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
