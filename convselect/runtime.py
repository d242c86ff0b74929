"""What `torch.compile` calls: a lowered graph with its weights, and a way to see which graphs a call ran."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from convselect.graph.program import Segment
from convselect.graph.weights import Constants
from convselect.plan import Plan

_recorders: list[list[tuple[CompiledGraph, list[Any]]]] = []


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
    ) -> None:
        """`module` and `body`, which may be the same, take the tuple of constants, then the inputs at `arguments`."""
        self.plan, self.module = plan, module
        self._body, self._constants = body, constants
        self._statics, self._arguments = statics, arguments

    def __call__(self, args: list[Any]) -> Any:
        for recorder in _recorders:
            recorder.append((self, list(args)))
        packed = self._constants.current([args[i] for i in self._statics])
        rest = [args[i] for i in self._arguments]
        args.clear()
        return self._body(packed, *rest)

    def measured_plan(self, args: list[Any], rounds: int = 10) -> Plan:
        """The plan with each layer's least time over `rounds` runs, in place: caches are as the network leaves them."""
        packed = self._constants.current([args[i] for i in self._statics])
        timer = _LayerTimer(self.module)
        with torch.inference_mode():
            for _ in range(rounds):
                timer.run(packed, *(args[i] for i in self._arguments))
        layers = (replace(layer, measured_ms=timer.least_ms.get(layer.name)) for layer in self.plan.layers)
        return replace(self.plan, layers=tuple(layers))


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


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[CompiledGraph, list[Any]]]]:
    """Collects the compiled graphs that run inside, each with its inputs."""
    record: list[tuple[CompiledGraph, list[Any]]] = []
    _recorders.append(record)
    try:
        yield record
    finally:
        _recorders.remove(record)


def run_graphs(fast: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[tuple[CompiledGraph, list[Any]]]:
    """Calls `fast(*inputs)` under inference mode and returns the compiled graphs that it ran."""
    with recording() as record, torch.inference_mode():
        fast(*inputs)
    return record
