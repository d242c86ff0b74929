"""CUDA graphs: a converted graph is captured for each shape of its inputs, then replayed without the host's launches.

A capture reads inputs at fixed addresses: weights at their own, everything else in buffers that each call copies into.
What the caller has marked by `torch._dynamo.mark_static_address` is read where it is as well. Results are copied out,
so that the next replay does not overwrite what a caller holds. Replays share memory, so one waits for the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.fx import Graph

from convselect.machine import tf32_allowed

MOST_SHAPES = 8
"""That are captured; each has its own results and buffers. Further ones run as without CUDA graphs."""
CAPTURED = f"captured for each shape of the inputs, up to {MOST_SHAPES}"
MOST_CAPTURES = 32
"""Of one graph: weights that move at each call are not worth capturing."""
_WARM_UPS = 3
"""Triton compiles in the first, cuDNN chooses its algorithm."""

Body = Callable[..., Sequence[Any]]
"""Takes the tuple of packed weights, then the other inputs."""


class Device(Protocol):
    """What capturing asks of CUDA."""

    device: torch.device

    def is_capturing(self) -> bool:
        """Whether the caller captures on the current stream."""

    def stream(self) -> Any:
        """The current one."""

    def wait(self, stream: Any) -> None:
        """The current stream goes on after all that `stream` was given."""

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Callable[[], None]]:
        """Warms up and records `run`: its results, and the replay, on the current stream, that computes them."""


class Cuda:
    """A GPU that is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def wait(self, stream: Any) -> None:
        self.stream().wait_stream(stream)

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Callable[[], None]]:
        with torch.cuda.device(self.device):
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(self.stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            self.wait(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                results = run()
            self._pool = graph.pool()
        return results, graph.replay


def refusal(graph: Graph, device: torch.device) -> str | None:
    """Why a lowered graph cannot be captured, as a sentence; None if it can."""
    for node in graph.nodes:
        value, tags = node.meta.get("val"), getattr(node.target, "tags", ())
        if isinstance(value, torch.Tensor) and value.device != device:
            return f"{node.name} is on {value.device}"
        if torch.Tag.nondeterministic_seeded in tags:
            return f"{node.name} draws random numbers"
        if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
            return f"what {node.name} gives decides sizes, so the host has to wait for it"
    return None


class _Captured:
    """One capture: `args` are what it reads, `owned` the positions of those that are buffers of ours."""

    def __init__(
        self, device: Device, body: Body, packed: tuple[torch.Tensor, ...], args: Sequence[Any], fixed: Sequence[bool]
    ) -> None:
        """Raises `RuntimeError` where it cannot be captured."""
        self.packed = packed
        self.fixed = [i for i, arg in enumerate(args) if fixed[i] or _is_marked(arg)]
        self.owned = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and i not in self.fixed]
        self.args = list(args)
        with torch.inference_mode(False), torch.no_grad():
            for i in self.owned:
                self.args[i] = torch.empty_strided(
                    args[i].shape, args[i].stride(), dtype=args[i].dtype, device=args[i].device
                )
        self._take(args)
        self.results, self._replay = device.capture(lambda: body(packed, *self.args))
        tensors = [result for result in self.results if isinstance(result, torch.Tensor)]
        if len({result.untyped_storage()._cdata for result in tensors}) < len(tensors):
            raise RuntimeError("its results share memory")

    def fits(self, packed: tuple[torch.Tensor, ...], args: Sequence[Any]) -> bool:
        return packed is self.packed and all(args[i].data_ptr() == self.args[i].data_ptr() for i in self.fixed)

    def _take(self, args: Sequence[Any]) -> None:
        for i in self.owned:
            self.args[i].copy_(args[i])

    @torch.no_grad()
    def __call__(self, args: Sequence[Any]) -> list[Any]:
        self._take(args)
        self._replay()
        return [_copy(result) if isinstance(result, torch.Tensor) else result for result in self.results]


class CudaGraphs:
    """Runs `body`, by replays where it can.

    fixed: for each input after the packed weights, whether it is a weight.
    told: gets the reason, as a sentence, when `body` from then on runs as it is.
    """

    def __init__(self, body: Body, device: Device, fixed: Sequence[bool], told: Callable[[str], None]) -> None:
        self._body, self._device, self._fixed, self._told = body, device, fixed, told
        self._known: dict[tuple[Any, ...], _Captured] = {}
        self._captures = 0
        self._last: Any = None
        self._lock = threading.Lock()

    def __call__(self, packed: tuple[torch.Tensor, ...], *args: Any) -> Sequence[Any]:
        if self._captures <= MOST_CAPTURES and not self._device.is_capturing():
            with self._lock:
                captured = self._captured(packed, args)
                if captured is not None:
                    return captured(args)
        return self._body(packed, *args)

    def _captured(self, packed: tuple[torch.Tensor, ...], args: Sequence[Any]) -> _Captured | None:
        """What to replay on the current stream, which then comes after the last replay."""
        key = (tf32_allowed(), *map(_kind, args))
        found = self._known.get(key)
        if found is None and (len(self._known) >= MOST_SHAPES or any(map(_overlaps, args))):
            return None
        stream = self._device.stream()
        if self._last is not None and stream != self._last:
            self._device.wait(self._last)
        self._last = stream
        if found is None or not found.fits(packed, args):
            self._captures += 1
            if self._captures > MOST_CAPTURES:
                self._give_up(f"its weights moved so often that it was captured {MOST_CAPTURES} times")
                return None
            try:
                found = self._known[key] = _Captured(self._device, self._body, packed, args, self._fixed)
            except RuntimeError as error:
                self._give_up(f"its capture failed: {error}")
                return None
        return found

    def _give_up(self, reason: str) -> None:
        self._captures = MOST_CAPTURES + 1
        self._known.clear()
        self._told(reason)


def _kind(arg: Any) -> Any:
    """What a capture is for: sizes, strides and type of a tensor; a number itself."""
    return (arg.shape, arg.stride(), arg.dtype) if isinstance(arg, torch.Tensor) else arg


def _is_marked(arg: Any) -> bool:
    return getattr(arg, "_dynamo_static_input_type", None) is not None


def _overlaps(arg: Any) -> bool:
    """Whether several elements lie at one address, as after `expand`."""
    return isinstance(arg, torch.Tensor) and torch._debug_has_internal_overlap(arg) == 1


def _copy(result: torch.Tensor) -> torch.Tensor:
    """With the same strides."""
    if _overlaps(result):
        return result.clone()
    same = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device)
    return same.copy_(result)
