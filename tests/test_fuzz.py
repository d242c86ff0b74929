"""Random models against eager: values, sizes, strides, and what shares memory with what.

`-m slow` draws thousands. Hypothesis shrinks a model that fails and prints it as a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from behaviour import Behaviour, check, only_errors
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plans import InTurn, RandomPlans
from sketch import Sketch, sketch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from without_dynamo import Compiled

import convselect
from convselect.backend import Backend
from convselect.graph.program import slices
from convselect.options import Options


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with only_errors():
        yield


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    return sketch(lambda options: draw(st.sampled_from(options)))


def fuzz(examples: int, derandomize: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of so many models."""
    return settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


class Variant(NamedTuple):
    """What else is drawn, beside the model."""

    dynamic: bool
    """Whether the batch is a symbol; then it changes."""
    new_weights: bool
    """Whether weights change after the first call."""
    special: bool
    """Whether inputs hold infinities and NaN; these stay what and where they are for accuracy "strict"."""
    cache: int
    """Bytes for which programs cut batches into slices."""
    seed: int
    """Of the random plan."""


variants = st.builds(
    Variant,
    st.sampled_from((False, False, False, True)),
    st.booleans(),
    st.sampled_from((False, False, False, True)),
    st.sampled_from((slices.CACHE, 1 << 12)),
    st.integers(0, 9),
)


def check_plans(sketch: Sketch, variant: Variant) -> None:
    """By the cost model's plan and by a random one: calls with several inputs, and with the first ones again."""
    model, inputs = sketch.made()
    batch, other = sketch.batches
    options = Options(calibrate="never", accuracy="strict" if variant.special else "default")
    backend = InTurn(Backend(options), RandomPlans(variant.seed, options))
    earlier: list[tuple[Behaviour, Behaviour]] = []

    def call(n: int, number: int) -> None:
        given = inputs(n, number)
        if variant.special:
            put_special(given)
        if compiled.fits(given):
            for backend.current in (0, 1):
                got = check(model, given, compiled, lambda: Compiled(model, aot_eager, first, variant.dynamic))
                earlier.append((got, got.copied()))

    with torch.inference_mode(), mock.patch.object(slices, "CACHE", variant.cache):
        first = inputs(batch, 0)
        compiled = Compiled(model, backend, first, variant.dynamic)
        call(batch, 0)
        if variant.new_weights:
            halve(model)
        call(batch, 1)
        call(other, 2)
        for got, copied in earlier:  # which no later call has written to
            torch.testing.assert_close(got.tensors, copied.tensors, rtol=0, atol=0, equal_nan=True)
            overwrite(got.tensors, model)
        call(batch, 0)


def put_special(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        for value, element in zip((torch.nan, torch.inf, -torch.inf), (0, -1, tensor.numel() // 2), strict=True):
            if tensor.numel():
                tensor[tuple(torch.unravel_index(torch.tensor(element % tensor.numel()), tensor.shape))] = value


def overwrite(tensors: Sequence[Tensor], model: nn.Module) -> None:
    """All of their memory but for that of the model's parameters: a caller may do as it likes with results."""
    kept = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    for tensor in tensors:
        if tensor.untyped_storage()._cdata not in kept:
            torch.empty(0).set_(tensor.untyped_storage()).fill_(torch.nan)


@torch.inference_mode(False)
@torch.no_grad()
def halve(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.5)


def check_compiled(sketch: Sketch) -> None:
    """By `convselect.compile`, with Dynamo: two calls, another batch, and the first one again."""
    torch._dynamo.reset()
    model, inputs = sketch.made()
    batch, other = sketch.batches
    fast = convselect.compile(model, calibrate="never")
    with torch.inference_mode():
        for number, n in enumerate((batch, batch, other, batch)):
            check(model, inputs(n, number), fast, lambda: torch.compile(model, backend="aot_eager"))


@pytest.mark.heavy
@fuzz(160)
@given(sketches(), variants)
def test_plans(sketch: Sketch, variant: Variant) -> None:
    check_plans(sketch, variant)


@pytest.mark.heavy
@fuzz(40)
@given(sketches())
def test_compiled(sketch: Sketch) -> None:
    check_compiled(sketch)


@pytest.mark.slow
@fuzz(4000, derandomize=False)
@given(sketches(), variants)
def test_thousands_of_plans(sketch: Sketch, variant: Variant) -> None:
    check_plans(sketch, variant)


@pytest.mark.slow
@fuzz(1000, derandomize=False)
@given(sketches())
def test_thousands_compiled(sketch: Sketch) -> None:
    check_compiled(sketch)
