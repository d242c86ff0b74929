"""The public functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parameter import is_lazy

from convselect.backend import Backend
from convselect.measure import calibration
from convselect.options import Options
from convselect.plan.explanation import Explanation
from convselect.plan.plan import merged
from convselect.runtime.compiled import run_graphs
from convselect.runtime.shortcut import as_compiled
from convselect.runtime.watcher import Watcher

_MOST_SIZES = 64
"""Compilations of one model, for different input sizes and modes, after which torch runs it eagerly and logs so."""


def compile(
    model: torch.nn.Module,
    *,
    accuracy: str = "default",
    calibrate: str = "auto",
    budget_s: float = 2.0,
    select: str = "model",
    memory_mb: float | None = None,
    remainder: str = "eager",
    cuda_graphs: str = "auto",
    dynamic: bool | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """A faster `model`, for inference: each convolution calls the primitive that is predicted fastest.

    The first call captures the model, selects and builds; call it under `torch.inference_mode()` or
    `torch.no_grad()`. Weights may change afterwards in any way, except around autograd (`.data`) on a
    GPU, which is not seen. Another spatial size of the input compiles again, another batch size does so once.

    Args:
        model: a `torch.nn.Module` in eval mode. Its two-dimensional convolutions are converted: float32 ones on a CPU,
            also half precision and autocast's on an NVIDIA GPU. Everything else runs as before.
        accuracy: "strict" (what errs by at most 2e-6 relative to float64, direct and GEMM-based), "default" (at most
            5e-6, also Winograd and FFT), or "fast" (at most 2e-5). Winograd and FFT compute an output from all of a
            tile, also from inputs that the kernel does not reach: NaN and infinity fill the tile, and values far larger
            than their neighbours, such as -9999 for no data, leave an error in it that is relative to themselves.
        calibrate: "auto" times a few primitives on a machine's first runs, until `budget_s` seconds have gone into it,
            "always" on each compilation, "never" takes the shipped model as it is.
        budget_s: seconds that calibration, and `select="model+verify"`, may spend timing.
        select: "model" predicts; "measure" times every candidate of every layer, which is slow; "model+verify"
            predicts, then times the close calls.
        memory_mb: bound on the memory of packed weights and workspace together; None is unbounded.
        remainder: "eager" or "inductor" runs the operators that are not convolutions.
        cuda_graphs: "auto" captures what runs on a GPU in a CUDA graph for each shape of the inputs, up to 8, and
            replays it: inputs are copied in, unless marked by `torch._dynamo.mark_static_address`, and results out.
            "never" does not.
        dynamic: as in `torch.compile`.
        strict: calls raise `UnconvertedError` where else a `ConvselectWarning` says that something runs unconverted.

    Raises:
        TypeError: `model` is no module.
        ValueError: an option has no such value, or `model` has parameters that are not initialised. A call raises it
            where no plan fits in `memory_mb`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {model!r} ({type(model).__name__}), must be a torch.nn.Module")
    if isinstance(model, OptimizedModule):  # compiled before: `torch.compile` compiles what it was made of, too
        model = model._orig_mod
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise ValueError(f"{name!r} is not initialised; run the model once on an example input before compiling it")
    options = Options(accuracy, calibrate, budget_s, select, memory_mb, remainder, cuda_graphs, strict)
    # Dynamo counts recompilations by code object, which models of one class share, and runs eagerly past its limit.
    # Where torch can, each call of ours has a count of its own, with room for many spatial sizes.
    own = {"isolate_recompiles": True, "recompile_limit": _MOST_SIZES}
    own = {name: value for name, value in own.items() if name in inspect.signature(torch.compile).parameters}
    torch_compile: Callable[..., Callable[..., Any]] = torch.compile  # its stubs know only some of these
    watcher = Watcher(model)
    fast = torch_compile(model, backend=Backend(options, watcher.for_backend()), dynamic=dynamic, **own)
    return as_compiled(fast, model, watcher, partial(compile, dynamic=dynamic, **asdict(options)))


def explain(fast: Callable[..., Any], *inputs: torch.Tensor) -> Explanation:
    """What `fast(*inputs)` runs and why, with predicted and measured times.

    Runs `fast` under inference mode: compiles it if that has not happened for inputs of this shape. Where capture
    split the model into several graphs, the explanation covers all of them.

    Raises:
        ValueError: the call ran no graph of convselect's.
    """
    ran = run_graphs(fast, inputs)
    if not ran:
        raise ValueError(
            f"{type(fast).__name__} ran no graph compiled by convselect; "
            'pass the result of convselect.compile(model) or torch.compile(model, backend="convselect")'
        )
    return Explanation(
        merged([run.graph.measured_plan(run.statics, run.rest) for run in ran]),
        type(getattr(fast, "_orig_mod", fast)).__name__,
    )


def calibrate(budget_s: float = 2.0, device: str = "cpu") -> None:
    """Times a few primitives on this machine and stores what they tell; what the first run does by itself.

    Args:
        budget_s: seconds to spend timing.
        device: "cpu", or "cuda" for the first GPU, in float32; other types are calibrated when first run.

    Raises:
        ValueError: no such device, or torch finds no GPU.
    """
    calibration.calibrate(budget_s, device)
