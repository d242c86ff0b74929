"""`convselect::gpu_conv`: a call of a GPU primitive as an operator that tracing does not look into.

What is called is told by its name and its problem, so that code which Inductor keeps on disk means the same thing in
every process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from convselect.graph.lower import Call
from convselect.layout import strides
from convselect.primitive import Activation, get
from convselect.problem import ConvProblem

_SCHEMA = """gpu_conv(
    Tensor src, Tensor packed, Tensor? bias, Tensor? residual, str primitive, str problem, str activation, float alpha,
    float beta) -> Tensor"""


@lru_cache(maxsize=4096)
def _call(primitive: str, problem: str, *activation: Any) -> Call:
    return Call(get(primitive), ConvProblem.parse(problem), Activation(*activation))


def _run(
    src: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, *call: Any
) -> torch.Tensor:
    return _call(*call)(src, packed, bias, residual)


def _fake(
    src: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, *call: Any
) -> torch.Tensor:
    p, layout = _call(*call).problem, _call(*call).primitive.dst_layout
    size = (src.shape[0], p.oc, p.oh, p.ow)
    return src.new_empty_strided(size, strides(size, layout))


@lru_cache(maxsize=1)
def _defined() -> tuple[torch.library.Library, Any]:
    """The library lives as long as the operator is to."""
    library: Any = torch.library.Library("convselect", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(_SCHEMA, tags=(torch.Tag.needs_exact_strides,))
    library.impl("gpu_conv", _run, "CompositeExplicitAutograd")
    torch.library.register_fake("convselect::gpu_conv", _fake, lib=library)
    return library, torch.ops.convselect.gpu_conv.default


def gpu_conv(call: Call, *operands: torch.Tensor | None) -> torch.Tensor:
    """`call(*operands)`, by the operator."""
    kind, alpha, beta = call.activation
    result: torch.Tensor = _defined()[1](*operands, call.primitive.name, str(call.problem), kind, alpha, beta)
    return result
