"""What a GPU reaches at most: rates of a copy and of a large matrix product in each precision."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from convselect.machine import gpu
from convselect.measure.cuda import CudaClock


def _median_ms(run: Callable[[], object], device: CudaClock, rounds: int = 15) -> float:
    device.warm_up(run)
    return statistics.median(device.elapsed_ms(run) for _ in range(rounds))


def ceilings() -> dict[str, Any]:
    """GB/s counts bytes read and written, TFLOP/s two operations for each multiply-add. "gpu": all of `Gpu`."""
    device, here = CudaClock(), gpu()
    found: dict[str, Any] = {
        "machine": f"{here.name}, {here.isa}, {here.cores} multiprocessors, driver {here.driver}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": f"torch {torch.__version__}, Triton {here.triton}, cuDNN {here.cudnn}",
        "gpu": asdict(here),
    }
    src = torch.rand(2**28, device="cuda")
    dst = torch.empty_like(src)
    found["copy_gbs"] = 2 * 4 * 2**28 / _median_ms(lambda: dst.copy_(src), device) * 1e-6
    n = 8192
    for dtype, tf32 in ((torch.float16, False), (torch.float32, True), (torch.float32, False)):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        c = torch.empty_like(a)
        key = "tf32" if tf32 else str(dtype).removeprefix("torch.")

        def product(a: torch.Tensor = a, b: torch.Tensor = b, c: torch.Tensor = c) -> None:
            torch.mm(a, b, out=c)

        found[f"{key}_tflops"] = 2 * n**3 / _median_ms(product, device) * 1e-9
    return found
