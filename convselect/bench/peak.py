"""The machine's float32 peak, as far as software reaches it: the best of three large matrix products."""

from __future__ import annotations

import torch

from convselect.measure.cpu import Run, interleaved
from convselect.primitive import IDENTITY, Primitive, get
from convselect.problem import ConvProblem

_ROUNDS = 12
_SIDE = 2048
_POINTWISE = ConvProblem(ic=1024, ih=64, iw=64, oc=1024, kh=1, kw=1)


@torch.inference_mode()
def gemm_gflops() -> dict[str, float]:
    """GFLOP/s with torch's current number of threads, interleaved; of each the quietest run."""
    a, b = torch.rand(_SIDE, _SIDE), torch.rand(_SIDE, _SIDE)
    runs: list[Run] = [lambda: a @ b]
    flops = [2.0 * _SIDE**3]
    names = [f"torch.mm, {_SIDE} square"]
    for label, primitive in (("oneDNN", get("onednn_nhwc")), ("our", get("pointwise_nhwc"))):
        runs.append(_convolution(primitive))
        flops.append(_POINTWISE.flops)
        names.append(f"{label} 1x1 convolution, {_POINTWISE.ih * _POINTWISE.iw} x {_POINTWISE.ic} -> {_POINTWISE.oc}")
    ms = interleaved(runs, rounds=_ROUNDS)[1:].min(axis=0)
    return {name: float(one / least * 1e-6) for name, one, least in zip(names, flops, ms, strict=True)}


def _convolution(primitive: Primitive) -> Run:
    p = _POINTWISE
    src = torch.rand(p.mb, p.ic, p.ih, p.iw).contiguous(memory_format=torch.channels_last)
    packed = primitive.prepack(p, torch.rand(p.oc, p.ic, 1, 1))
    return lambda: primitive.run(p, IDENTITY, src, packed, None, None)
