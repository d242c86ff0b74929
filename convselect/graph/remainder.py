"""`remainder="inductor"`: the operators that are not ours, compiled by Inductor around the primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from convselect.graph.custom_op import gpu_conv
from convselect.graph.lower import Call, ScaleShift, copied
from convselect.graph.nodes import args_of
from convselect.graph.operators import in_programs
from convselect.primitives.gpu.norms import by_aten


class _Opaque(Interpreter):
    """With GPU primitives as operators, and GPU batch norms as what Inductor can fuse."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, Call) and not target.primitive.traceable:
            return gpu_conv(target, *args)
        if isinstance(target, ScaleShift) and not in_programs(args[0]):
            src, scale, shift = args
            return by_aten(src, scale, shift, target.activation)
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decompositions give other strides than the operators that they stand for."""
        planned = [node.meta.get("val") for node in args_of(self.graph.output_node())[0]]
        return [_with_strides_of(value, like) for value, like in zip(args[0], planned, strict=True)]


def _with_strides_of(value: Any, planned: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.stride() == planned.stride():
        return value
    return copied(value, planned.stride())


def traced(module: GraphModule, fake: FakeTensorMode, constants: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    """`module` as ATen's operators and ours, and its inputs; `constants` as in `compile_remainder`."""
    import torch._inductor.lowering  # noqa: F401  (decompositions use it, and do not import it; a second)
    from torch._inductor.decomposition import select_decomp_table

    placeholders = module.graph.find_nodes(op="placeholder")
    inputs = [*constants, *(node.meta["val"] for node in placeholders[len(constants) :])]
    with fake:
        flat = make_fx(_Opaque(module).run, decomposition_table=select_decomp_table(), tracing_mode="real")(*inputs)
    return flat, inputs


def compile_remainder(module: GraphModule, fake: FakeTensorMode, constants: Sequence[Any]) -> Callable[..., Any]:
    """`module` with its calls of primitives as opaque operators and everything else fused by Inductor.

    constants: fakes of the packed weights and biases, the module's first inputs.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    flat, inputs = traced(module, fake, constants)
    output = flat.graph.output_node()
    output.meta["user_visible_output_idxs"] = [*range(len(args_of(output)[0]))]  # whose strides Inductor leaves
    compiled = compile_fx_inner(flat, inputs)
    return lambda packed, *args: compiled([*packed, *args])
