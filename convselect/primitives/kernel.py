"""Primitives that are kernels of our own: one class, the families are rows of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import convselect.kernels  # noqa: F401  (loads the operators)
from convselect.layout import Layout, strides
from convselect.machine import Machine
from convselect.primitive import ACTIVATIONS, Activation, Primitive
from convselect.problem import ConvProblem

Rule = Callable[[ConvProblem], str | None]
"""A necessary condition: None, or the sentence that says why the problem does not meet it."""

_OPS = torch.ops.convselect


def ungrouped(p: ConvProblem) -> str | None:
    return f"groups are not supported (g={p.g})" if p.g > 1 else None


class KernelPrimitive(Primitive):
    """A row of the kernel table in `kernels/cpu`, with the rules of what it can take."""

    def __init__(
        self,
        name: str,
        family: str,
        src_layout: Layout,
        dst_layout: Layout,
        rules: tuple[Rule, ...],
        accuracy: str = "strict",
        error_bound: float = 2e-6,
    ) -> None:
        self.name, self.family = name, family
        self.src_layout, self.dst_layout = src_layout, dst_layout
        self.accuracy, self.error_bound = accuracy, error_bound
        self._rules = rules
        self.kernel = _OPS.kernel_id(_encode(name))
        if self.kernel < 0:
            raise ValueError(f"the compiled library has no kernel named {name!r}")

    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        return next((reason for rule in self._rules if (reason := rule(problem))), None)

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return int(_OPS.workspace_bytes(self.kernel, _sizes(problem), problem.geometry, machine.threads))

    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return int(_OPS.packed_bytes(self.kernel, _sizes(problem), problem.geometry))

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = _OPS.pack(weight.contiguous(), self.kernel, _sizes(problem), problem.geometry)
        return packed

    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        kind, alpha, beta = activation
        dst: torch.Tensor = _OPS.conv(
            src, packed, bias, residual, self.kernel, problem.geometry, ACTIVATIONS.index(kind), alpha, beta
        )
        return dst

    def prepared(
        self, problem: ConvProblem, activation: Activation, src: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor
    ) -> Callable[[], object]:
        """Into memory that stays, as a program's arena does: glibc gives blocks of 32 MiB and more back as soon as they
        are freed, and a call that takes such a one for its result pays for every page again.
        """
        size = (src.shape[0], problem.oc, problem.oh, problem.ow)
        dst = src.new_empty_strided(size, strides(size, self.dst_layout))
        nbytes = _OPS.workspace_bytes(self.kernel, _sizes(problem), problem.geometry, torch.get_num_threads())
        kind, alpha, beta = activation
        return partial(
            _OPS.conv_out,
            dst,
            src.new_empty(nbytes // 4),
            src,
            packed,
            bias,
            None,
            self.kernel,
            problem.geometry,
            ACTIVATIONS.index(kind),
            alpha,
            beta,
        )


def _sizes(problem: ConvProblem) -> list[int]:
    return [problem.mb, problem.ic, problem.ih, problem.iw]


def _encode(name: str) -> list[int]:
    """ASCII codes of `name`: the stable ABI's string conversion leaks, its integer lists do not."""
    return list(name.encode("ascii"))
