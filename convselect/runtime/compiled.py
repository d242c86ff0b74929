"""What `torch.compile` calls: a lowered graph with its weights, and a way to see which graphs a call ran."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Interpreter, Node

from convselect.graph.program.segment import Segment
from convselect.plan.plan import Plan
from convselect.runtime.weights import Constants
from convselect.streams import Interval

_CPU = torch.device("cpu")
_AHEAD_CYCLES = 100_000_000
"""50 ms at 2 GHz: longer than the host takes to launch a network."""

_recorders: ContextVar[tuple[list[Run], ...]] = ContextVar("_recorders", default=())


class CompiledGraph:
    """One graph, compiled. Called with the list of all its inputs, weights included, as AOTAutograd does."""

    _boxed_call = True

    def __init__(
        self,
        plan: Plan,
        module: GraphModule,
        body: Callable[..., Any],
        constants: Constants,
        statics: Sequence[int],
        arguments: Sequence[int],
        device: torch.device = _CPU,
    ) -> None:
        """`module` and `body`, which may be the same, take the tuple of constants, then the inputs at `arguments`."""
        self.plan, self.module, self.body, self.device = plan, module, body, device
        self._constants = constants
        self._statics, self._arguments = statics, arguments

    def __call__(self, args: list[Any]) -> Any:
        statics, rest = [args[i] for i in self._statics], [_plain(args[i]) for i in self._arguments]
        args.clear()
        return self.run(statics, rest)

    def run(self, statics: list[torch.Tensor], rest: list[Any]) -> Any:
        """Runs the body on the constants for `statics`, then `rest`: the inputs that it takes after them."""
        results = self.body(self._constants.current(statics), *rest)
        for recorder in _recorders.get():
            recorder.append(Run(self, statics, rest, results))
        return results

    def measured_plan(self, statics: list[torch.Tensor], rest: list[Any], rounds: int = 10) -> Plan:
        """The plan with each layer's least time over `rounds` runs, in place: caches are as the network leaves them."""
        packed = self._constants.current(statics)
        timer = _LayerTimer(self.module) if self.device.type == "cpu" else _GpuLayerTimer(self.module, self.device)
        with torch.inference_mode(), torch._C._DisableAutocast():
            for _ in range(rounds):
                timer.run(packed, *rest)
        layers = (replace(layer, measured_ms=timer.least_ms.get(layer.name)) for layer in self.plan.layers)
        return replace(self.plan, layers=tuple(layers))


def _plain(value: Any) -> Any:
    """A tensor of a subclass that only says how Python's operators treat it (tv_tensors.Image) as a tensor.

    Dynamo has traced what it says, and operators of ours know no such classes.
    """
    if not isinstance(value, torch.Tensor) or type(value) in (torch.Tensor, torch.nn.Parameter):
        return value
    only_python = type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return value.as_subclass(torch.Tensor) if only_python else value


class _LayerTimer(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.least_ms: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        if isinstance(n.target, Segment):
            args, _ = self.fetch_args_kwargs_from_env(n)
            result, times = n.target.timed(*args)
        else:
            start = time.perf_counter()
            result = super().run_node(n)
            times = {layer: 1e3 * (time.perf_counter() - start)} if (layer := n.meta.get("layer")) else {}
        for layer, ms in times.items():
            self.least_ms[layer] = min(ms, self.least_ms.get(layer, ms))
        return result


class _GpuLayerTimer(_LayerTimer):
    """By events. The GPU first waits, so that the host has launched everything when it begins: between two events then
    lies no launch.
    """

    def __init__(self, module: GraphModule, device: torch.device) -> None:
        super().__init__(module)
        self._device = device
        self._intervals: list[tuple[str, Interval]] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(self._device):
            torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]
            result = super().run(*args, **kwargs)
            torch.cuda.synchronize()
        for layer, interval in self._intervals:
            ms = interval.ms()
            self.least_ms[layer] = min(ms, self.least_ms.get(layer, ms))
        self._intervals.clear()
        return result

    def run_node(self, n: Node) -> Any:
        layer = n.meta.get("layer")
        if layer is None:
            return Interpreter.run_node(self, n)
        with Interval() as interval:
            result = Interpreter.run_node(self, n)
        self._intervals.append((layer, interval))
        return result


class Run(NamedTuple):
    """One call of `CompiledGraph.run`."""

    graph: CompiledGraph
    statics: list[torch.Tensor]
    rest: list[Any]
    results: Sequence[Any]


@contextlib.contextmanager
def recording() -> Iterator[list[Run]]:
    """Collects the compiled graphs that this thread runs inside."""
    record: list[Run] = []
    token = _recorders.set((*_recorders.get(), record))
    try:
        yield record
    finally:
        _recorders.reset(token)


def run_graphs(fast: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[Run]:
    """Calls `fast(*inputs)` under inference mode and returns the compiled graphs that it ran."""
    with recording() as record, torch.inference_mode():
        fast(*inputs)
    return record
