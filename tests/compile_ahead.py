"""Compiles what the GPU primitives launch for a GPU that is not there: `compile_ahead.py 90 float16`.

Prints a JSON list, an entry a kernel: {"primitive", "precision", "kernel", "odd", "warps", "registers", "stack_bytes",
"shared_bytes", "bound_bytes", "wgmma", "conversions": how often a block changes hands between threads,
"adjacent_threads": whether those of a warp read adjacent elements of some block, one each,
"load_bytes", "store_bytes", "copy_bytes": the sizes of asynchronous copies}.
Runs in a process of its own, since Triton either interprets or compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import triton
from gpu import DTYPES, TRITON, epilogue, machine
from triton.backends.compiler import GPUTarget

from convselect.kernels.triton import elementwise
from convselect.kernels.triton.launch import NOTHING, Launch
from convselect.layout import Layout, strides
from convselect.primitive import Activation
from convselect.primitives.gpu.base import Operands
from convselect.problem import ConvProblem

COPY = re.compile(r"cp\.async\.c[ag][^;]*?, 0x([0-9a-f]+),")
PLAIN = re.compile(r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+) ")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

PROBLEMS = [
    ConvProblem(mb=2, ic=24, ih=28, iw=28, oc=264, kh=3, kw=3, ph=1, pw=1),
    ConvProblem(mb=2, ic=40, ih=14, iw=14, oc=264, kh=1, kw=1),
    ConvProblem(mb=2, g=32, ic=256, ih=28, iw=28, oc=256, kh=3, kw=3, ph=1, pw=1),
    ConvProblem(mb=2, g=24, ic=24, ih=28, iw=28, oc=24, kh=3, kw=3, ph=1, pw=1),
    ConvProblem(mb=2, ic=3, ih=224, iw=224, oc=64, kh=7, kw=7, sh=2, sw=2, ph=3, pw=3),
]
"""Like those of real networks, with channels that 8 divides and 16 does not.

Each primitive is compiled for the first that it takes, with bias, residual and activation; one in `ODD`, without them,
for the same with a few channels more, and one in `BFLOAT16` for bfloat16.
"""
ODD, BFLOAT16 = 3, 4


class Driver:
    """What Triton's launcher asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", found)
    assert match, found
    return int(match[1]), int(match[2])


def plain(ptx: str, kind: str) -> list[int]:
    """Sizes of the loads ("ld") or stores ("st") of global memory, other than asynchronous copies."""
    return sorted({int(count or 1) * int(bits) // 8 for op, count, bits in PLAIN.findall(ptx) if op == kind})


def meta(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def activations(size: tuple[int, int, int, int], layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, strides(size, layout), dtype=dtype, device="meta")


def with_more_channels(p: ConvProblem, more: int) -> ConvProblem:
    """`more` in each group, or groups of a depthwise convolution."""
    if p.g == p.ic == p.oc:
        return replace(p, g=p.g + more, ic=p.ic + more, oc=p.oc + more)
    return replace(p, ic=p.ic + more * p.g, oc=p.oc + more * p.g)


def of_primitives(capability: int, precision: str) -> Iterator[tuple[str, int, bool, Launch]]:
    """Name, the shared memory that the primitive says it takes, whether channels are odd, and a launch."""
    dtype, tf32 = DTYPES[precision], precision == "tf32"
    for i, primitive in enumerate(TRITON):
        able = [p for p in PROBLEMS if primitive.refusal(p, machine(precision, capability)) is None]
        if not able:
            assert primitive.refusal(PROBLEMS[0], machine(precision, capability)), "no problem for this primitive"
            continue
        if precision == "bfloat16" and i % BFLOAT16:
            continue
        for odd in (False, True) if i % ODD == 0 else (False,):
            p = with_more_channels(able[0], 1 << i // ODD % 3) if odd else able[0]
            src = activations((p.mb, p.ic, p.ih, p.iw), primitive.src_layout, dtype)
            dst = activations((p.mb, p.oc, p.oh, p.ow), primitive.dst_layout, dtype)
            packed = primitive.prepack(p, meta(p.oc, p.ic // p.g, p.kh, p.kw, dtype=dtype))
            end = epilogue(Activation("relu"), meta(p.oc, dtype=dtype), torch.empty_like(dst))
            for launch in primitive.launches(p, Operands(src, packed, dst, NOTHING if odd else end), tf32):
                yield primitive.name, primitive.shared_bytes(), odd, launch


def of_the_rest(precision: str) -> Iterator[tuple[str, int, bool, Launch]]:
    """What runs beside the primitives: the epilogue after cuDNN, of a single element too, and batch norms."""
    dtype = DTYPES[precision]
    for layout in Layout:
        nhwc = layout is Layout.NHWC
        for size in ((2, 264, 28, 28), (1, 1, 1, 1)):
            dst, norm = activations(size, layout, dtype), meta(size[1], dtype=torch.float32)
            end = epilogue(Activation("relu"), meta(size[1], dtype=dtype), torch.empty_like(dst))
            odd = size[1] == 1
            yield f"epilogue_{layout}", 0, odd, elementwise.launches(dst, dst, nhwc, end)[0]
            yield f"scale_shift_{layout}", 0, odd, elementwise.launches(dst, torch.empty_like(dst), nhwc, end, norm)[0]


def compiled(capability: int, precision: str) -> list[dict[str, object]]:
    entries, seen = [], set()
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    for name, bound, odd, launch in chain(of_primitives(capability, precision), of_the_rest(precision)):
        kernel = launch.kernel.warmup(
            *launch.args, grid=launch.grid, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
        )
        if kernel.hash in seen:
            continue
        seen.add(kernel.hash)
        registers, stack = resources(kernel.asm["cubin"])
        ptx = kernel.asm["ptx"]
        entries.append(
            {
                "primitive": name,
                "precision": precision,
                "kernel": kernel.metadata.name,
                "odd": odd,
                "warps": launch.warps,
                "registers": registers,
                "stack_bytes": stack,
                "shared_bytes": kernel.metadata.shared,
                "bound_bytes": bound,
                "wgmma": "wgmma.mma_async" in ptx,
                "conversions": kernel.asm["ttgir"].count("ttg.convert_layout"),
                "adjacent_threads": "sizePerThread = [1, 1]" in kernel.asm["ttgir"],
                "load_bytes": plain(ptx, "ld"),
                "store_bytes": plain(ptx, "st"),
                "copy_bytes": sorted({int(size, 16) for size in COPY.findall(ptx)}),
            }
        )
    return entries


if __name__ == "__main__":
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(Driver(capability))
    print(json.dumps(compiled(capability, sys.argv[2])))
