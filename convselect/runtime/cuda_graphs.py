"""CUDA graphs: a converted graph is captured for each shape of its inputs, then replayed without the host's launches.

A capture reads inputs at fixed addresses: weights at their own, everything else in buffers that each call copies into.
What the caller has marked by `torch._dynamo.mark_static_address` is read where it is as well, until it has moved often.
Results are copied out, so that the next replay does not overwrite what a caller holds. Replays share memory, so one
waits for the last.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from convselect import streams
from convselect.errors import brief
from convselect.machine import tf32_allowed

MOST_SHAPES = 8
"""That are captured; each has its own results and buffers. Further ones run as without CUDA graphs."""
CAPTURED = f"captured for each shape of the inputs, up to {MOST_SHAPES}"
MOST_MOVES = 4
"""How often an input that is read where it is may move, which takes another capture; then it is copied like others."""
_WARM_UPS = 3
"""Triton compiles in the first, cuDNN chooses its algorithm."""
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # torch 2.9 and later

Body = Callable[..., Sequence[Any]]
"""Takes the tuple of packed weights, then the other inputs."""


class Device(Protocol):
    """What capturing asks of CUDA."""

    def is_capturing(self) -> bool:
        """Whether the caller captures on the current stream."""

    def wait(self) -> None:
        """The current stream goes on after what was given to the stream of the last `record` before that."""

    def record(self) -> None: ...

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Callable[[], None]]:
        """Warms up and records `run`: its results, and the replay, on the current stream, that computes them."""


class Cuda:
    """A GPU that is there."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, streams.Ready(device)
        self.is_capturing, self.wait, self.record = streams.is_capturing, self._last.wait, self._last.record
        with torch.cuda.device(device):
            # One for all captures: memory is used again on the stream that it was taken on.
            self._side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._newest: Any = None

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Callable[[], None]]:
        caller: Any = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device):
            self._side.wait_stream(caller)
            with torch.cuda.stream(self._side):
                for _ in range(_WARM_UPS):
                    run()
            caller.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            with streams.CAPTURES:
                results = self._recorded(graph, run, caller)
        self._newest = graph
        return results, graph.replay

    def _recorded(self, graph: Any, run: Callable[[], Sequence[Any]], caller: Any) -> Sequence[Any]:
        pool = torch.cuda.graph_pool_handle() if self._newest is None else self._newest.pool()
        # cuBLAS would go on with the workspace of the warm-up, which others may have freed (Inductor does). So the
        # graph takes one from its own pool, and nobody goes on with that one.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._side, capture_error_mode="thread_local"):
                return run()
        except BaseException:
            self._newest = None
            with suppress(RuntimeError):  # raised unless the capture became invalid: torch then leaves the pool open
                torch._C._cuda_endAllocateToPool(self._device.index, pool)
                torch._C._cuda_releasePool(self._device.index, pool)
            raise
        finally:
            torch.cuda.set_stream(caller)  # torch stays on the other one where the capture became invalid
            torch._C._cuda_clearCublasWorkspaces()


def refusal(graph: Graph, device: torch.device) -> str | None:
    """Why a lowered graph cannot be captured, as a sentence; None if it can."""
    for node in graph.nodes:
        value, tags = node.meta.get("val"), getattr(node.target, "tags", ())
        if isinstance(value, torch.Tensor) and value.device != device:
            return f"{node.name} is on {value.device}"
        if torch.Tag.nondeterministic_seeded in tags:
            return f"{node.name} draws random numbers"
        if torch.Tag.data_dependent_output in tags or (
            isinstance(value, torch.Tensor) and free_unbacked_symbols(value)
        ):
            return f"what {node.name} gives decides sizes, so the host has to wait for it"
        if _UNSAFE in tags:
            return f"{node.name} is marked as unsafe in a CUDA graph"
    return None


class _Captured:
    """One capture: `args` are what it reads, `owned` the positions of those that are buffers of ours."""

    def __init__(
        self,
        device: Device,
        body: Body,
        packed: tuple[torch.Tensor, ...],
        args: Sequence[Any],
        fixed: Sequence[int],
        moves: Counter[int],
    ) -> None:
        """fixed: the positions of what is read where it is. moves: how often what lies at each has moved so far."""
        self.packed, self.fixed, self.moves = packed, fixed, moves
        self.owned = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and i not in fixed]
        self.args = list(args)
        with torch.inference_mode(False), torch.no_grad():
            for i in self.owned:
                self.args[i] = torch.empty_strided(
                    args[i].shape, args[i].stride(), dtype=args[i].dtype, device=args[i].device
                )
        self._take(args)
        self.results, self._replay = device.capture(lambda: body(packed, *self.args))
        given, read = _storages(self.results), _storages((*packed, *self.args))
        if len({*given}) < len(given) or not {*read}.isdisjoint(given):
            raise RuntimeError("a result shares memory with another or with an input")

    def moved(self, args: Sequence[Any]) -> list[int]:
        """The positions of what would have to be read elsewhere."""
        return [i for i in self.fixed if args[i].data_ptr() != self.args[i].data_ptr()]

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
    told: gets a sentence for each shape of the inputs that could not be captured, where `body` runs as it is.
    """

    def __init__(self, body: Body, device: Device, fixed: Sequence[bool], told: Callable[[str], None]) -> None:
        self._body, self._device, self._fixed, self._told = body, device, fixed, told
        self._known: dict[tuple[Any, ...], _Captured | None] = {}
        """By switches and shapes; None where capturing failed."""
        self._lock = threading.Lock()

    def __call__(self, packed: tuple[torch.Tensor, ...], *args: Any) -> Sequence[Any]:
        if not self._device.is_capturing():
            with self._lock:
                captured = self._captured(packed, args)
                if captured is not None:
                    self._device.wait()
                    try:
                        return captured(args)
                    finally:
                        self._device.record()
        return self._body(packed, *args)

    def _captured(self, packed: tuple[torch.Tensor, ...], args: Sequence[Any]) -> _Captured | None:
        key = (*_switches(), *map(_kind, args))
        moves: Counter[int] = Counter()
        if key in self._known:
            found = self._known[key]
            if found is None:
                return None
            moved = found.moved(args)
            if packed is found.packed and not moved:
                return found
            moves = found.moves + Counter(moved)
        elif len(self._known) >= MOST_SHAPES or any(map(_overlaps, args)):
            return None
        fixed = [i for i, arg in enumerate(args) if (self._fixed[i] or _is_marked(arg)) and moves[i] <= MOST_MOVES]
        try:
            captured = self._known[key] = _Captured(self._device, self._body, packed, args, fixed, moves)
        except Exception as error:  # Triton's have no common type
            self._known[key], reason = None, brief(error)
        else:
            return captured
        sizes = ", ".join(
            "x".join(map(str, arg.shape))
            for arg, is_weight in zip(args, self._fixed, strict=True)
            if isinstance(arg, torch.Tensor) and not is_weight
        )
        self._told(f"inputs of {sizes} run without a CUDA graph, as capturing one failed: {reason}")
        return None


def _switches() -> tuple[bool, ...]:
    """torch's switches that Dynamo does not compile again for: they decide which of cuDNN's kernels a capture has."""
    cudnn = torch.backends.cudnn
    return tf32_allowed(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic


def _kind(arg: Any) -> Any:
    """What a capture is for: sizes, strides and type of a tensor; a number itself."""
    return (arg.shape, arg.stride(), arg.dtype) if isinstance(arg, torch.Tensor) else arg


def _is_marked(arg: Any) -> bool:
    return getattr(arg, "_dynamo_static_input_type", None) is not None


def _overlaps(arg: Any) -> bool:
    """Whether several elements lie at one address, as after `expand`."""
    return isinstance(arg, torch.Tensor) and torch._debug_has_internal_overlap(arg) == 1


def _storages(values: Sequence[Any]) -> list[int]:
    return [value.untyped_storage()._cdata for value in values if isinstance(value, torch.Tensor)]


def _copy(result: torch.Tensor) -> torch.Tensor:
    """With the same strides."""
    if _overlaps(result):
        return result.clone()
    same = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device)
    return same.copy_(result)
