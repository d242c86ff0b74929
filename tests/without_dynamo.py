"""Compiles a model as `torch.compile` does but without Dynamo, which takes most of the time: for tests of many models.

The model's `forward` takes tensors only and begins with `n = x0.shape[0]`. `torch.fx` must be able to trace the rest:
no other sizes of tensors, and no control flow on values.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.source import LocalSource
from torch._guards import GuardSource, TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatefulSymbolicContext

Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


class _Tracer(Tracer):
    """Into every module; also what makes tensors of numbers is a part of the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        with contextlib.ExitStack() as stack:
            for name in ("ones", "eye"):
                make = partial(self._make, getattr(torch, name))
                stack.enter_context(mock.patch.object(torch, name, make))
            return super().trace(root, concrete_args)

    def _make(self, function: Callable[..., Tensor], *sizes: int) -> Any:
        return self.create_proxy("call_function", function, sizes, {})


class Compiled:
    """A model that `backend` has compiled, for the sizes of `inputs` or, where `dynamic`, for any batch.

    Called with inputs; `fits` says whether they are of sizes that it was compiled for.
    """

    def __init__(self, model: nn.Module, backend: Backend, inputs: Sequence[Tensor], dynamic: bool) -> None:
        graph = _Tracer().trace(model)
        placeholders = graph.find_nodes(op="placeholder")
        self._parameters = _lift_parameters(graph, model, placeholders[-1])
        self._shapes = ShapeEnv()
        dynamic = dynamic and inputs[0].shape[0] > 1  # torch fixes sizes of 0 and 1, as Dynamo knows beforehand
        context = TracingContext(FakeTensorMode(shape_env=self._shapes))
        for node, value in zip(graph.find_nodes(op="placeholder"), (*inputs, *self._parameters), strict=True):
            context.tensor_to_context[value] = _symbols(node.name, value, dynamic and node in placeholders)
        self._fakes = [_fake(context, value) for value in inputs]
        batch = self._fakes[0].shape[0]
        self._dynamic = isinstance(batch, torch.SymInt)
        _replace_batch(graph, placeholders[0], batch)
        with tracing(context):
            self._function = backend(GraphModule(model, graph), [*[batch] * self._dynamic, *inputs, *self._parameters])

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        same = all(mine.dim() == value.dim() for mine, value in zip(self._fakes, inputs, strict=True))
        return same and self._shapes.evaluate_guards_for_args(self._fakes, inputs, ignore_static=False)

    def __call__(self, *inputs: Tensor) -> Any:
        return tuple(self._function(*[inputs[0].shape[0]] * self._dynamic, *inputs, *self._parameters))


def _symbols(name: str, value: Tensor, dynamic: bool) -> StatefulSymbolicContext:
    """Which sizes of a tensor are symbols: the first one or none."""
    sizes = [DimDynamic.DUCK if dynamic and dim == 0 else DimDynamic.STATIC for dim in range(value.dim())]
    return StatefulSymbolicContext(sizes, tensor_source=LocalSource(name), shape_env_to_source_to_symbol_cache={})


def _fake(context: TracingContext, value: Tensor) -> Tensor:
    symbols = context.tensor_to_context[value]
    return context.fake_mode.from_tensor(value, source=symbols.tensor_source, symbolic_context=symbols)


def _replace_batch(graph: Graph, first: Node, batch: int | torch.SymInt) -> None:
    """`first.shape[0]` becomes a number, or the first placeholder, as Dynamo does it."""
    shape = next(user for user in first.users if user.args[1:] == ("shape",))
    (size,) = shape.users
    with graph.inserting_before(first):
        size.replace_all_uses_with(graph.placeholder("n") if isinstance(batch, torch.SymInt) else batch)
    graph.erase_node(size)
    graph.erase_node(shape)


def _lift_parameters(graph: Graph, model: nn.Module, last: Node) -> list[Tensor]:
    """Parameters become placeholders after `last`, and are returned."""
    made: dict[str, Node] = {}
    parameters = []
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in made:
            with graph.inserting_after(last):
                last = made[node.target] = graph.placeholder(node.target.replace(".", "_"))
            parameters.append(operator.attrgetter(node.target)(model))
            source = SimpleNamespace(guard_source=GuardSource.LOCAL_UNSPECIALIZED_NN_MODULE)
            last.meta["grapharg"] = SimpleNamespace(source=source, example=parameters[-1])
        node.replace_all_uses_with(made[node.target])
        graph.erase_node(node)
    return parameters
