"""`remainder="inductor"`: the operators that are not ours, compiled by Inductor around the primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def compile_remainder(module: GraphModule, fake: FakeTensorMode, constants: Sequence[Any]) -> Callable[..., Any]:
    """`module` with its calls of primitives as opaque operators and everything else fused by Inductor.

    constants: fakes of the packed weights and biases, the module's first inputs.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    inputs = [*constants, *(node.meta["val"] for node in placeholders[len(constants) :])]
    with fake:
        flat = make_fx(module, decomposition_table=select_decomp_table(), tracing_mode="real")(*inputs)
    compiled = compile_fx_inner(flat, inputs)
    return lambda packed, *args: compiled([*packed, *args])
