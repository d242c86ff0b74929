"""GPU primitives where there is no GPU: Triton's interpreter, pretended machines and timers, watched buffers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convselect.layout import Layout, strides
from convselect.machine import Gpu, gpu
from convselect.primitive import ACTIVATIONS, IDENTITY, Activation, Primitive, primitives
from convselect.primitives.gpu.base import TritonPrimitive, epilogue
from convselect.problem import ConvProblem

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")  # conftest.py decides

RATES = {
    "machine": "Some GPU",
    "date": "2000-01-01",
    "versions": "torch 0",
    "command": "gpu.sh",
    "tests": "passed",
    "copy_gbs": 1000.0,
    "float16_tflops": 100.0,
    "tf32_tflops": 50.0,
    "float32_tflops": 10.0,
}
needs_networks = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the networks are torchvision's, which is not installed"
)

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TRITON = [primitive for primitive in primitives("cuda") if isinstance(primitive, TritonPrimitive)]


def machine(precision: str = "float32", capability: int = 90, triton: str = "3.6.0") -> Gpu:
    """An H200's numbers, or an A100's."""
    shared = {80: 166912, 90: 232448}.get(capability, 101376)
    return Gpu(
        "cuda",
        f"a GPU of capability {capability}",
        f"sm_{capability}",
        132,
        1,
        shared,
        50 * 2**20,
        0,
        precision,
        1980000,
        3201000,
        6144,
        140 * 2**30,
        13000,
        91002,
        triton,
    )


def here(precision: str = "float32") -> Gpu:
    """The GPU, or an H200 where there is none."""
    return replace(gpu(), precision=precision) if DEVICE.type == "cuda" else machine(precision)


def able(p: ConvProblem, precision: str = "float32") -> list[TritonPrimitive]:
    return [primitive for primitive in TRITON if primitive.refusal(p, here(precision)) is None]


GUARD = 1024
"""Elements of NaN before and after each buffer that a primitive allocates."""


@contextmanager
def watched() -> Iterator[None]:
    """Buffers that `launches` and `run` allocate are full of NaN, and nothing is written outside of them."""
    buffers = []

    def new_empty_strided(like, size, stride, dtype=None):
        count = 1
        for n in size:
            count *= n
        whole = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype or like.dtype, device=like.device)
        buffers.append(whole)
        return whole.as_strided(size, stride, GUARD)

    def new_empty(like, size, dtype=None, **other):
        if other:  # the interpreter's own
            return kept[1](like, size, dtype=dtype, **other)
        dense = [1] * len(size)
        for i in range(len(size) - 2, -1, -1):
            dense[i] = dense[i + 1] * size[i + 1]
        return new_empty_strided(like, size, dense, dtype)

    kept = torch.Tensor.new_empty_strided, torch.Tensor.new_empty
    torch.Tensor.new_empty_strided, torch.Tensor.new_empty = new_empty_strided, new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty_strided, torch.Tensor.new_empty = kept
    for whole in buffers:
        assert whole[:GUARD].isnan().all(), "written before a buffer"
        assert whole[-GUARD:].isnan().all(), "written after a buffer"


def to(x: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty_strided(x.shape, strides(x.shape, layout), dtype=dtype, device=DEVICE).copy_(x)


def run(
    primitive: TritonPrimitive,
    p: ConvProblem,
    precision: str,
    src: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation = IDENTITY,
) -> torch.Tensor:
    """On the CPU, f64. The operands are rounded to the dtype first, as the caller's reference must be."""
    dtype = DTYPES[precision]
    own = weight.to(DEVICE, dtype, copy=True)
    source = to(src, primitive.src_layout, dtype)
    shift = None if bias is None else bias.to(DEVICE, dtype)
    rest = None if residual is None else to(residual, primitive.dst_layout, dtype)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        packed = primitive.prepack(p, own)
        assert packed.shape == primitive.packed_shape(p, own.element_size())
        own.fill_(float("nan"))  # packed must not alias it
        with watched():
            dst = primitive.run(p, activation, source, packed, shift, rest)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    size = (src.shape[0], p.oc, p.oh, p.ow)
    assert dst.shape == size
    assert dst.stride() == strides(size, primitive.dst_layout)
    return dst.cpu().double()


class Named(Primitive):
    """Logs that it ran."""

    device, src_layout, dst_layout = "cuda", Layout.NHWC, Layout.NHWC

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = self.family = name
        self.log = log

    def refusal(self, problem, machine):
        return None

    def workspace_bytes(self, problem, machine):
        return 0

    def packed_bytes(self, problem, machine):
        return problem.weight_bytes

    def prepack(self, problem, weight):
        return weight.clone()

    def run(self, problem, activation, src, packed, bias, residual):
        assert src.is_contiguous(memory_format=torch.channels_last)
        assert activation.kind == "relu"
        assert bias is not None
        self.log.append(self.name)
        return src


class FakeDevice:
    """For a `GpuTimer`: every call takes 1 ms for each letter of its name; a replay runs nothing again."""

    device = torch.device("cpu")

    def __init__(self, log: list[str]) -> None:
        self.log, self.replayed, self.warmed, self.freed = log, [], [], 0

    def warm_up(self, run: Callable[[], object]) -> None:
        run()
        self.warmed.append(list(self.log))
        self.log.clear()

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        run()
        captured = list(self.log)
        self.log.clear()
        return lambda: self.replayed.append(captured)

    def elapsed_ms(self, run: Callable[[], None]) -> float:
        run()
        return float(sum(map(len, self.replayed[-1]))) or 1.0

    def free_memory(self) -> None:
        self.freed += 1


__all__ = [
    "ACTIVATIONS",
    "DEVICE",
    "DTYPES",
    "RATES",
    "TRITON",
    "FakeDevice",
    "Named",
    "able",
    "epilogue",
    "here",
    "machine",
    "needs_networks",
    "run",
    "to",
    "watched",
]
