"""What a call does, as its caller can see it: results, what they share memory with, and what became of the inputs."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CONVOLUTION_ERROR = 5e-6
"""rel-L2 error of a convolution in the accuracy class "default"."""
OTHER_ERROR = 5e-7
"""Of any other operator that computes: a few units in the last place of float32."""


@dataclass(frozen=True)
class Behaviour:
    """Of one call: `tensors` are its inputs, as it left them, and then the tensors among its results."""

    tensors: list[Tensor]
    rest: object
    """The results' structure, and those that are no tensors."""

    @classmethod
    def of(cls, function: Callable[..., object], inputs: Sequence[Tensor]) -> Behaviour:
        """Calls `function` on `inputs` themselves."""
        leaves, structure = pytree.tree_flatten(function(*inputs))
        results = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls([*inputs, *results], (structure, rest))

    def form(self) -> list[tuple[object, ...]]:
        """Each tensor's sizes, strides and type; the first tensor whose memory it shares, and how far from it it is."""
        first: dict[int, tuple[int, int]] = {}
        described = []
        for i, tensor in enumerate(self.tensors):
            storage = tensor.untyped_storage()
            key = storage.data_ptr() or storage._cdata
            owner, offset = first.setdefault(key, (i, tensor.storage_offset()))
            strides = tensor.stride()
            described.append((tuple(tensor.shape), strides, tensor.dtype, owner, tensor.storage_offset() - offset))
        return described

    def copied(self) -> Behaviour:
        """The same with values that nobody else can change."""
        return Behaviour([tensor.clone() for tensor in self.tensors], self.rest)


def copies(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that lie in memory and share it as `tensors` do. `dtype`: of the floating-point ones."""
    memory: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in memory:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            memory[storage._cdata] = whole.to(dtype if tensor.is_floating_point() else None, copy=True)
        whole = memory[storage._cdata]
        made[id(tensor)] = whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    return [made[id(tensor)] for tensor in tensors]


class _Noise(TorchDispatchMode):
    """Adds to each operator's result an error as large as float32 and the accuracy class allow."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns_new = all(each.alias_info is None for each in func._schema.returns)
        if returns_new and not func._schema.is_mutable:
            relative = CONVOLUTION_ERROR if func is torch.ops.aten.convolution.default else OTHER_ERROR
            pytree.tree_map_only(Tensor, lambda tensor: self._disturb(tensor, relative), result)
        return result

    def _disturb(self, tensor: Tensor, relative: float) -> None:
        if tensor.is_floating_point() and tensor.numel():
            rms = tensor.square().mean().sqrt()
            noise = torch.randn(tensor.shape, dtype=tensor.dtype, generator=self._generator)
            tensor.add_(noise * relative * rms.nan_to_num(0.0, 0.0, 0.0))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Expected:
    """What eager does, in float32, in float64, and in float64 with errors as large as are allowed."""

    eager: Behaviour
    exact: Behaviour
    disturbed: Behaviour

    @classmethod
    def of(cls, model: torch.nn.Module, inputs: Sequence[Tensor]) -> Expected:
        wide = copy.deepcopy(model).double()
        eager = Behaviour.of(model, copies(inputs))
        with _default_dtype(torch.float64):
            exact = Behaviour.of(wide, copies(inputs, torch.float64))
            with _Noise():
                disturbed = Behaviour.of(wide, copies(inputs, torch.float64))
        return cls(eager, exact, disturbed)

    def difference(self, got: Behaviour) -> str | None:
        """In what `got` is not as eager; None if it is in nothing."""
        return self.difference_in_form(got) or self.difference_in_values(got)

    def difference_in_form(self, got: Behaviour) -> str | None:
        if got.rest != self.eager.rest:
            return f"the results are {got.rest}, eager's are {self.eager.rest}"
        for i, (mine, eagers) in enumerate(zip(got.form(), self.eager.form(), strict=True)):
            if mine != eagers:
                return f"tensor {i}: (sizes, strides, type, owner, offset) are {mine}, eager's are {eagers}"
        return None

    def difference_in_values(self, got: Behaviour) -> str | None:
        behaviours = (got, self.eager, self.exact, self.disturbed)
        for i, tensors in enumerate(zip(*(each.tensors for each in behaviours), strict=True)):
            if (sentence := _difference(*tensors)) is not None:
                return f"tensor {i}: {sentence}"
        return None


def _difference(got: Tensor, eager: Tensor, exact: Tensor, disturbed: Tensor) -> str | None:
    """Four times what errors of the allowed size do to the result is allowed, and so is four times eager's error."""
    if not got.is_floating_point():
        return None if torch.equal(got, eager) else "other values than eager's"
    finite = eager.isfinite()
    if not torch.equal(finite, exact.isfinite()):
        return None  # float32 overflows
    if not torch.equal(got.isfinite(), finite) or not torch.equal(_special(got), _special(eager)):
        return "infinities or NaN elsewhere than eager's"
    if not finite.any():
        return None
    exact, largest = exact[finite], exact[finite].abs().max().item()
    error, eagers, allowed = ((each[finite].double() - exact).abs().max().item() for each in (got, eager, disturbed))
    bound = 4 * (allowed + eagers) + 1e-6 * largest
    if error <= bound:
        return None
    return (
        f"errs by {error:.3g}, allowed is {bound:.3g}; eager's error is {eagers:.3g}, the largest value {largest:.3g}"
    )


def _special(tensor: Tensor) -> Tensor:
    """Infinities by their sign, and NaN as 3; 0 where a tensor is finite."""
    return torch.where(tensor.isfinite(), 0.0, tensor).nan_to_num(3.0, 1.0, -1.0)


Function = Callable[..., object]


def check(
    model: torch.nn.Module, inputs: Sequence[Tensor], call: Function, aot_eager: Callable[[], Function]
) -> Behaviour:
    """What `call` does with copies of `inputs`: what eager does.

    Where the model compiled by torch's own `aot_eager` differs from eager or raises, `call` may do the same, with the
    same message: it gets its graphs in the same way.
    """
    expected = Expected.of(model, inputs)
    try:
        got = Behaviour.of(call, copies(inputs))
    except Exception as error:
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            Behaviour.of(aot_eager(), copies(inputs))
        return expected.eager
    difference = expected.difference(got)
    if difference is not None:
        alone = replace(expected, eager=Behaviour.of(aot_eager(), copies(inputs)))
        assert alone.difference(got) is None, difference
    return got


@contextmanager
def only_errors() -> Iterator[None]:
    """No warnings of what stays with ATen, nor of what torch deprecates; one of an error in convselect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "(?s).*an error in convselect")
        yield
