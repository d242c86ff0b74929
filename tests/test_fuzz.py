"""Random models against eager: values, sizes, strides, and what shares memory with what.

`-m slow` draws thousands. Hypothesis shrinks a model that fails and prints it as a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from behaviour import Behaviour, check, only_errors
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plans import InTurn, RandomPlans
from sketch import Sketch, sketch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from without_dynamo import Compiled

import convselect
from convselect.backend import Backend
from convselect.graph import slices
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
        max_examples=examples, derandomize=derandomize, deadline=None, database=None, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def check_plans(sketch: Sketch, dynamic: bool, new_weights: bool, cache: int, seed: int) -> None:
    """By the cost model's plan and by a random one: two calls and, where `dynamic`, a third one with another batch.

    new_weights: they change after the first call. cache: bytes for which programs cut batches into slices.
    """
    model, inputs = sketch.made()
    batch, other = sketch.batches
    backend = InTurn(Backend(Options(calibrate="never")), RandomPlans(seed))
    earlier: list[tuple[Behaviour, Behaviour]] = []
    with torch.inference_mode(), mock.patch.object(slices, "CACHE", cache):
        first = inputs(batch, 0)
        compiled = Compiled(model, backend, first, dynamic)
        for number, n in enumerate((batch, batch, other)):
            given = inputs(n, number)
            if not compiled.fits(given):
                continue
            if number == 1 and new_weights:
                halve(model)
            for backend.current in (0, 1):
                got = check(model, given, compiled, lambda: Compiled(model, aot_eager, first, dynamic))
                earlier.append((got, got.copied()))
    for got, copied in earlier:
        torch.testing.assert_close(got.tensors, copied.tensors, rtol=0, atol=0, equal_nan=True)  # later calls left them


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


plans = given(
    sketches(), st.sampled_from((False, False, False, True)), st.booleans(), st.sampled_from((slices.CACHE, 1 << 12)),
    st.integers(0, 9),
)  # fmt: skip


@fuzz(160)
@plans
def test_plans(sketch: Sketch, dynamic: bool, new_weights: bool, cache: int, seed: int) -> None:
    check_plans(sketch, dynamic, new_weights, cache, seed)


@fuzz(40)
@given(sketches())
def test_compiled(sketch: Sketch) -> None:
    check_compiled(sketch)


@pytest.mark.slow
@fuzz(4000, derandomize=False)
@plans
def test_thousands_of_plans(sketch: Sketch, dynamic: bool, new_weights: bool, cache: int, seed: int) -> None:
    check_plans(sketch, dynamic, new_weights, cache, seed)


@pytest.mark.slow
@fuzz(1000, derandomize=False)
@given(sketches())
def test_thousands_compiled(sketch: Sketch) -> None:
    check_compiled(sketch)
