"""The strides of a graph's results: eager's, also where the tracer's differ.

What tracing says of strides is not always what ATen's kernels give (`relu` of one channel, `roll` of a channels_last
tensor), and an operator in place keeps strides that the one it is traced as does not (`masked_fill_`). Where a graph
has tensors that are not contiguous, it is run once as it was written, and its results are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, PlainAOTOutput
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter

from convselect.graph.capture import known_size, size_hint

Strides = dict[int, tuple[int, ...]]
"""By position among the graph's results."""


def eager_strides(graph: Graph, eager: GraphModule, inputs: Sequence[Any]) -> Strides:
    """Those of `graph`'s results that differ from what was traced.

    graph: as AOTAutograd made it. eager: Dynamo's module, of `inputs`, which stay as they are.
    """
    values = [node.meta.get("val") for node in graph.nodes]
    if all(map(_plain, values)) or any(isinstance(value, FakeTensor) for value in inputs):
        return {}
    output = graph.output_node()
    origins = output.meta.get("desc") or [None] * len(output.args[0])
    mutated = {getattr(origin.mutated_input, "idx", None) for origin in origins if _is_mutation(origin)}
    if None in mutated:  # a weight, which is no argument
        return {}
    copies = [_argument(value, i in mutated) for i, value in enumerate(inputs)]
    try:
        with torch.random.fork_rng():
            results = Interpreter(eager).run(*copies)
    except Exception:  # the model's own, which the call that compiles it is about to raise
        return {}
    found: Strides = {}
    for position, (node, origin) in enumerate(zip(output.args[0], origins, strict=True)):
        if not isinstance(origin, PlainAOTOutput):
            continue
        real, traced = results[origin.idx], node.meta["val"]
        if not isinstance(real, torch.Tensor) or not _hold_for_all(real, traced):
            continue
        if real.stride() != tuple(map(size_hint, traced.stride())):
            found[position] = real.stride()
    return found


def _argument(value: Any, is_mutated: bool) -> Any:
    """What stands for an input, so that it stays as it is, its sizes and strides as well."""
    if isinstance(value, torch.SymInt):
        return size_hint(value)
    if type(value) is not torch.Tensor:
        return value
    return value.clone() if is_mutated else value.detach()


def _is_mutation(origin: object) -> bool:
    return isinstance(origin, InputMutationAOTOutput)


def _plain(value: Any) -> bool:
    """Whether nothing about the strides of `value` can be in doubt."""
    if not isinstance(value, torch.Tensor) or value.dim() < 3:
        return True
    expected = torch.empty_like(value, memory_format=torch.contiguous_format, device="meta").stride()
    return value.stride() == expected


def _hold_for_all(real: torch.Tensor, traced: torch.Tensor) -> bool:
    """Whether the strides are those of any batch: what varies is outermost."""
    varying = [d for d, size in enumerate(traced.shape) if known_size(size) is None]
    return all(real.stride(d) == max(real.stride()) for d in varying) and len(varying) <= 1
