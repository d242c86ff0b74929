"""Times of GPU primitives, by events around replays of CUDA graphs: the host's clock would see its own launches.

A graph holds several calls of one primitive, each with its own copy of the packed weights, so that together they
exceed the L2 and weights come from memory as they do in a network; the source stays where the layer before left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from convselect import streams
from convselect.layout import Layout
from convselect.machine import Gpu
from convselect.measure.cpu import ABANDON, in_turns, passed, robust_ms
from convselect.primitive import Activation, Primitive
from convselect.problem import ConvProblem

_RELU = Activation("relu")
_MOST_CALLS = 32
_LEAST_CALLS = 4
_WARM_UPS = 3
"""Calls before capture: Triton compiles in the first, cuDNN chooses its algorithm."""
_IDLE_PART = 4
"""The allocator gives memory back, once a problem is done, where more than one such part of the GPU's lies idle."""


class GpuClock(Protocol):
    """What timing asks of CUDA."""

    device: torch.device

    def warm_up(self, run: Callable[[], object]) -> None:
        """`run` on the stream that capture will use."""

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """Records `run`; what is returned replays it, and keeps `run` alive, which holds what the graph reads."""

    def elapsed_ms(self, run: Callable[[], object]) -> float:
        """Milliseconds that the GPU takes for `run`."""

    def free_memory(self) -> None:
        """Gives back the memory of graphs that are gone, where much is kept."""


class CudaClock:
    """A GPU that is there."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        with torch.cuda.device(self.device):
            self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def _current(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def warm_up(self, run: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._current():
            for _ in range(_WARM_UPS):
                run()
        self._stream.synchronize()

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with (
            streams.CAPTURES,
            self._current(),
        ):  # `torch.cuda.graph` would also collect garbage and empty the allocator's cache
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:  # the stream would go on capturing
                graph.capture_end()

        def replay(_kept: Callable[[], object] = run) -> None:
            graph.replay()

        return replay

    def elapsed_ms(self, run: Callable[[], object]) -> float:
        with self._current(), streams.Interval() as interval:
            run()
        return interval.ms()

    def free_memory(self) -> None:
        """Each graph has a pool of its own, which the allocator keeps, and cannot give back during a capture."""
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if _IDLE_PART * idle > torch.cuda.get_device_properties(self.device).total_memory:
            with streams.CAPTURES:
                torch.cuda.empty_cache()


class GpuTimer:
    """The GPU's counterpart of `cpu.PrimitiveTimer`. Epilogue: ReLU and a bias, float32 as a folded batch norm's."""

    def __init__(self, machine: Gpu, dtype: torch.dtype, device: GpuClock) -> None:
        self.machine, self.dtype, self._device = machine, dtype, device
        self._random = torch.Generator(device.device)  # the user's random numbers stay where they are

    def calls(self, problem: ConvProblem) -> int:
        """How many calls a graph has: enough for twice the L2."""
        size = self.dtype.itemsize
        touched = (problem.weight_bytes + problem.dst_bytes) // 4 * size
        return max(_LEAST_CALLS, min(_MOST_CALLS, -(-2 * self.machine.l2_bytes // touched)))

    def time_primitives(
        self,
        problem: ConvProblem,
        primitives: Sequence[Primitive],
        *,
        rounds: int = 7,
        deadline: float | None = None,
        abandon: float = ABANDON,
    ) -> dict[str, float]:
        """Primitive -> milliseconds of one call; interleaved over `rounds`. The primitives must accept the problem.

        One that was beyond `abandon` times the best twice is not timed again. After `deadline`
        (perf_counter seconds) no further one is compiled, and those not yet begun are left out.
        """
        with torch.inference_mode():
            times = self._time(problem, primitives, rounds, deadline, abandon)
        self._device.free_memory()
        return times

    def time_transforms(
        self, shapes: Sequence[tuple[int, int, int, int]], *, rounds: int = 7, deadline: float | None = None
    ) -> list[tuple[str, int, int, float]]:
        """(key, bytes read and written, threads, ms) of both changes of layout, as a plan runs them on a GPU."""
        rows = []
        with torch.inference_mode():
            for shape in shapes:
                if passed(deadline):
                    break
                for source, target in (Layout, tuple(Layout)[::-1]):
                    src = self._draw(*shape).contiguous(memory_format=source.memory_format)

                    def run(src: torch.Tensor = src, target: Layout = target) -> None:
                        for _ in range(_LEAST_CALLS):
                            src.contiguous(memory_format=target.memory_format)

                    self._device.warm_up(run)
                    replay = self._device.capture(run)
                    times = [[self._device.elapsed_ms(replay) / _LEAST_CALLS] for _ in range(rounds)]
                    nbytes = 2 * src.numel() * src.element_size()
                    rows.append((f"to_{target}", nbytes, self.machine.threads, float(robust_ms(times)[0])))
        return rows

    def _draw(self, *size: int) -> torch.Tensor:
        return torch.rand(size, generator=self._random, device=self._device.device, dtype=self.dtype) - 0.5

    def record(
        self, p: ConvProblem, primitive: Primitive, src: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> Callable[[], None] | None:
        """The replay of `calls(p)` calls. A subclass may leave a primitive out, by None."""
        packed = primitive.prepack(p, weight)
        packs = [packed, *(packed.clone() for _ in range(self.calls(p) - 1))]

        def run(packs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            """All results live until the last is there, so that none finds its memory in the L2."""
            return [primitive.run(p, _RELU, src, packed, bias, None) for packed in packs]

        self._device.warm_up(lambda: run([packed]))
        return self._device.capture(lambda: run(packs))

    def _time(
        self, p: ConvProblem, primitives: Sequence[Primitive], rounds: int, deadline: float | None, abandon: float
    ) -> dict[str, float]:
        draw = self._draw
        weight, plain = draw(p.oc, p.ic // p.g, p.kh, p.kw), draw(p.mb, p.ic, p.ih, p.iw)
        bias = draw(p.oc).float()
        sources = {layout: plain.contiguous(memory_format=layout.memory_format) for layout in Layout}
        timed, replays = [], []
        for primitive in primitives:
            if passed(deadline):
                break
            replay = self.record(p, primitive, sources[primitive.src_layout], weight, bias)
            if replay is not None:
                timed.append(primitive)
                replays.append(replay)

        def measure(index: int) -> float:
            return self._device.elapsed_ms(replays[index]) / self.calls(p)

        times = in_turns(measure, len(replays), rounds=rounds, abandon=abandon)
        return {q.name: float(ms) for q, ms in zip(timed, robust_ms(times), strict=True)}
