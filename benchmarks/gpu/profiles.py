"""Primitives timed on the convolutions of the networks, where some may fail; and compiled before, in many processes."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import PRECISIONS, allow_tf32
from worker import Note, add_failure, caught, read, tell

from convselect.costs import model_for
from convselect.kernels.triton.launch import Launch
from convselect.layout import strides
from convselect.machine import Gpu, gpu
from convselect.measure import profiling
from convselect.measure.cuda import CudaClock, GpuClock, GpuTimer
from convselect.primitive import IDENTITY, Activation, Primitive, primitives
from convselect.primitives.gpu.base import Operands, TritonPrimitive, epilogue
from convselect.problem import ConvProblem

MOST_DEATHS, MOST_ERRORS = 2, 5
"""Problems on which a primitive may kill the worker, or raise, before it is not tried on others."""

End = tuple[Activation, bool]
"""An epilogue: its activation, and whether there is a residual."""
RELU: End = (Activation("relu"), False)
_RESIDUALS: tuple[End, ...] = ((Activation("relu"), True), (IDENTITY, False))
_LINEAR: tuple[End, ...] = ((IDENTITY, False), (IDENTITY, True))
ENDS: Mapping[str, tuple[End, ...]] = {
    "resnet18": _RESIDUALS,
    "resnet50": _RESIDUALS,
    "densenet121": _LINEAR[:1],
    "mobilenet_v2": ((Activation("clamp", 0.0, 6.0), False), *_LINEAR),
    "efficientnet_b0": ((Activation("silu"), False), *_LINEAR),
}
"""Of a network, beside bias and ReLU."""
WITHOUT_NORMS = ("alexnet", "vgg11", "vgg16", "squeezenet1_1")
"""Their biases are of their own type; those that folding makes are float32."""
_LIKELY = 4
"""Primitives of a problem that are compiled with a network's own epilogues: the fastest by prediction."""


class Watched:
    """A primitive that notes when its turn comes, and refuses what it failed on before."""

    def __init__(self, primitive: Primitive, precision: str, failed: set[str], note: Note) -> None:
        self._primitive, self._precision, self._failed, self._note = primitive, precision, failed, note
        self._noted = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._primitive, name)

    def refusal(self, problem: ConvProblem, machine: Gpu) -> str | None:
        return "it failed here" if str(problem) in self._failed else self._primitive.refusal(problem, machine)

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        if self._noted != str(problem):
            self._noted = str(problem)
            self._note(precision=self._precision, primitive=self._primitive.name, problem=str(problem))
        return self._primitive.prepack(problem, weight)


def watched(precision: str, failures: Sequence[Mapping[str, Any]], note: Note) -> list[Watched]:
    """The primitives of GPUs without those that fail everywhere, and ATen, which calls cuDNN too."""
    mine = [f for f in failures if f.get("precision") == precision and "primitive" in f]
    deaths = Counter(f["primitive"] for f in mine if "traceback" not in f)
    errors = Counter(f["primitive"] for f in mine if "traceback" in f)
    return [
        Watched(q, precision, {f["problem"] for f in mine if f["primitive"] == q.name}, note)
        for q in primitives("cuda")
        if q.family != "aten" and deaths[q.name] < MOST_DEATHS and errors[q.name] < MOST_ERRORS
    ]


class Forgiving(GpuTimer):
    """Leaves out a primitive that raises, and adds that to the file `failures`."""

    def __init__(self, machine: Gpu, dtype: torch.dtype, device: GpuClock, failures: Path) -> None:
        super().__init__(machine, dtype, device)
        self._failures = failures
        self._errors: Counter[str] = Counter()

    def record(
        self, p: ConvProblem, primitive: Primitive, src: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> Callable[[], None] | None:
        if self._errors[primitive.name] >= MOST_ERRORS:
            return None
        try:
            return super().record(p, primitive, src, weight, bias)
        except Exception:  # whatever it is: the traceback is kept, and the others are timed
            what = {"precision": self.machine.precision, "primitive": primitive.name, "problem": str(p)}
            add_failure(self._failures, {**what, **caught(self._device.device)})
            self._errors[primitive.name] += 1
            return None


def forgiving(dtype: torch.dtype, failures: Path) -> GpuTimer:
    return Forgiving(gpu(0, dtype), dtype, CudaClock(), failures)


def profile(
    out: Path,
    problems: Sequence[ConvProblem],
    note: Note,
    budget_s: float,
    timer: Callable[[torch.dtype, Path], Any] = forgiving,
) -> bool:
    """Both precisions, each in half of the time. Whether all problems are timed."""
    allow_tf32()
    torch.backends.cudnn.benchmark = True
    complete = True
    start, failures = time.monotonic(), out / "failures.json"
    for left, (precision, dtype) in zip((2, 1), PRECISIONS.items(), strict=True):
        rest = (budget_s - (time.monotonic() - start)) / left
        note(precision=precision, what="layout transforms")
        some: Any = watched(precision, read(failures), note)
        own = timer(dtype, failures)
        assert own.machine.precision == precision, f"torch's switches make it {own.machine.precision}"
        path = out / f"profile_{precision}.parquet"
        done = profiling.profile(path, problems, some, timer=own, budget_s=max(rest, 1.0), rounds=5)
        tell(f"{precision}: {done}")
        complete = complete and done.complete
    return complete


def launches(
    p: ConvProblem, primitive: TritonPrimitive, dtype: torch.dtype, end: End, bias: torch.dtype, tf32: bool
) -> list[Launch]:
    """On tensors without memory."""
    size = (p.mb, p.oc, p.oh, p.ow)

    def meta(size: tuple[int, ...], stride: tuple[int, ...], of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=of, device="meta")

    src = meta((p.mb, p.ic, p.ih, p.iw), strides((p.mb, p.ic, p.ih, p.iw), primitive.src_layout))
    dst, rest = (meta(size, strides(size, primitive.dst_layout)) for _ in range(2))
    packed = primitive.prepack(p, torch.empty(p.oc, p.ic // p.g, p.kh, p.kw, dtype=dtype, device="meta"))
    ending = epilogue(end[0], meta((p.oc,), (1,), bias), rest if end[1] else None)
    return primitive.launches(p, Operands(src, packed, dst, ending), tf32)


def all_launches(here: Gpu, networks: Mapping[str, Sequence[ConvProblem]]) -> Iterator[Launch]:
    """What `profile` will time, then what the networks will run in all likelihood. Many are alike to Triton."""
    dtype, tf32 = PRECISIONS[here.precision], here.precision == "tf32"
    triton: list[Any] = [q for q in primitives("cuda") if isinstance(q, TritonPrimitive)]
    able = {p: [q for q in triton if q.refusal(p, here) is None] for of in networks.values() for p in of}
    for p, some in able.items():
        for primitive in some:
            yield from launches(p, primitive, dtype, RELU, torch.float32, tf32)
    model = model_for(here)
    for name, problems in networks.items():
        plain = name in WITHOUT_NORMS
        ends = [RELU] if plain and dtype != torch.float32 else ENDS.get(name, ())
        for p in dict.fromkeys(problems) if ends else ():
            log_ms = model.log_predict([p], [(q.name, q.family) for q in able[p]], 1)[0][0]
            for i in log_ms.argsort()[:_LIKELY]:
                for end in ends:
                    yield from launches(p, able[p][i], dtype, end, dtype if plain else torch.float32, tf32)


def specialization(launch: Launch) -> str:
    """What launches have in common that share a compiled kernel."""
    kinds = [_kind(x, param.do_not_specialize) for x, param in zip(launch.args, launch.kernel.params, strict=False)]
    return repr((launch.kernel.fn.__name__, sorted(launch.constants.items()), launch.warps, launch.stages, kinds))


def _kind(x: Any, any_value: bool) -> str:
    """As Triton tells arguments apart; an address on the meta device is divisible by anything."""
    if isinstance(x, int):
        width = "i32" if x < 2**31 else "i64"
        return width if any_value else f"{width} {'1' if x == 1 else x % 16 == 0}"
    return str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__


def compile_kernels(networks: Mapping[str, Sequence[ConvProblem]], shard: int, shards: int) -> None:
    """Those that are this shard's, into Triton's cache, which tells what is there already."""
    allow_tf32()
    seen: set[str] = set()
    for dtype in PRECISIONS.values():
        for launch in all_launches(gpu(0, dtype), networks):
            key = specialization(launch)
            if key in seen or zlib.crc32(key.encode()) % shards != shard:
                continue
            seen.add(key)
            try:
                launch.kernel.warmup(
                    *launch.args, grid=launch.grid, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
                )
            except Exception as error:  # the part `profile` will keep its traceback
                tell(f"{key} does not compile: {type(error).__name__}: {error}")
