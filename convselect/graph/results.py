"""The strides of a graph's results: eager's, also where the tracer's differ.

What tracing says of strides is not always what ATen's kernels give (`relu` of one channel, `roll` of a channels_last
tensor), and an operator in place keeps strides that the one it is traced as does not (`masked_fill_`). Where a graph
has tensors that are not contiguous, it is run once as it was written, and its results are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, PlainAOTOutput
from torch._prims_common import clone_preserve_strides
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from convselect.graph.capture import known_size, size_hint
from convselect.graph.nodes import args_of

_MATRICES = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
"""What gives a contiguous matrix, whatever the strides of its operands: the classifier of most networks."""

Strides = dict[int, tuple[int, ...]]
"""By position among the graph's results."""


def eager_strides(graph: Graph, eager: GraphModule, inputs: Sequence[Any]) -> Strides:
    """Those of `graph`'s results that differ from what was traced.

    graph: as AOTAutograd made it. eager: Dynamo's module, of `inputs`, which stay as they are.
    """
    output = graph.output_node()
    if all(node.target in _MATRICES for node in output.all_input_nodes) or all(map(_plain, graph.nodes)):
        return {}
    if any(isinstance(value, FakeTensor) for value in inputs):
        return {}
    origins = output.meta.get("desc") or [None] * len(args_of(output)[0])
    mutated = {getattr(origin.mutated_input, "idx", None) for origin in origins if _is_mutation(origin)}
    if None in mutated:  # a weight, which is no argument
        return {}
    copies = [_argument(value, i in mutated) for i, value in enumerate(inputs)]
    try:
        with torch.random.fork_rng():
            real = Interpreter(eager).run(*copies)
    except Exception:  # the model's own, which the call that compiles it is about to raise
        return {}
    found: Strides = {}
    for position, (node, origin) in enumerate(zip(args_of(output)[0], origins, strict=True)):
        if not isinstance(origin, PlainAOTOutput):
            continue
        result, traced = real[origin.idx], node.meta["val"]
        if not isinstance(result, torch.Tensor) or not _hold_for_all(result, traced):
            continue
        if result.stride() != _hints(traced.stride()):
            found[position] = result.stride()
    return found


def _argument(value: Any, is_mutated: bool) -> Any:
    """What stands for an input, so that it stays as it is, its sizes and strides as well."""
    if isinstance(value, torch.SymInt):
        return size_hint(value)
    if type(value) is not torch.Tensor:
        return value
    return clone_preserve_strides(value) if is_mutated else value.detach()  # type: ignore[no-untyped-call]


def _is_mutation(origin: object) -> bool:
    return isinstance(origin, InputMutationAOTOutput)


def _plain(node: Node) -> bool:
    """Whether nothing about the strides of the node's value can be in doubt."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 3:
        return True
    return _hints(value.stride()) == _contiguous(_hints(value.shape))


def _hints(sizes: Sequence[int | torch.SymInt]) -> tuple[int, ...]:
    return tuple(map(size_hint, sizes))


def _contiguous(size: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor; asking a fake one costs a millisecond."""
    inner_first = itertools.accumulate(reversed(size[1:]), lambda stride, n: stride * max(n, 1), initial=1)
    return tuple(inner_first)[::-1]


def _hold_for_all(real: torch.Tensor, traced: torch.Tensor) -> bool:
    """Whether the strides are those of any batch: what varies is outermost."""
    varying = [d for d, size in enumerate(traced.shape) if known_size(size) is None]
    return all(real.stride(d) == max(real.stride()) for d in varying) and len(varying) <= 1
