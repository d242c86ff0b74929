"""Programs run in slices of a batch: the same bits, less memory, and the time of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from made_up import choose
from test_program import GRAPHS, X, compiled, segments, steps

from convselect.choices import leaving_ms
from convselect.graph.program import slices
from convselect.graph.program.segment import Segment
from convselect.machine import cpu
from convselect.primitive import get
from convselect.problem import ConvProblem
from convselect.runtime.compiled import run_graphs


@pytest.mark.parametrize("name", GRAPHS)
@torch.inference_mode()
def test_slices_give_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    """Of one and of several images, also where they do not divide the batch, whatever the arena held before."""
    choose(monkeypatch, "direct_nhwc")
    _, fast = compiled(name)
    x = torch.randn(5, *X.shape[1:])
    x[3, 1, 2, 3] = torch.nan
    for threads in (1, 2):  # each has a plan of its own
        set_threads(threads)
        monkeypatch.setattr(slices, "CACHE", 1 << 30)
        want = fast(x)
        counts = {steps(fast, x)}
        for cache in (0, 20_000 // threads, 40_000 // threads):
            monkeypatch.setattr(slices, "CACHE", cache)
            for segment in segments(fast, x):
                segment._programs[1].clear()
                for arena in segment._arenas:
                    arena.fill_(torch.nan)
            torch.testing.assert_close(fast(x), want, rtol=0, atol=0, equal_nan=True)
            counts.add(steps(fast, x))
        outweighed = name == "hidden layer" or name.startswith("one pixel")  # by the weights, with some primitives
        assert len(counts) > 1 or outweighed


@torch.inference_mode()
def test_slices_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the head makes for itself is there once, not once for each image."""
    choose(monkeypatch, "direct_nhwc")
    monkeypatch.setattr(slices, "CACHE", 0)
    _, fast = compiled("classifier")
    floats = []
    for mb in (2, 8):
        (segment,) = segments(fast, torch.randn(mb, *X.shape[1:]))
        floats.append(max(program.arena_floats for program in segment._programs[1].values()))
    assert floats[1] < 2 * floats[0]


@torch.inference_mode()
def test_the_time_of_a_layer_is_that_of_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "direct_nhwc")
    monkeypatch.setattr(slices, "CACHE", 0)
    _, fast = compiled("chain")
    x = torch.randn(6, *X.shape[1:])
    (segment,) = segments(fast, x)
    (run,) = run_graphs(fast, [x])
    packed = run.graph._constants.current(run.statics)
    program = segment.program(packed, ())
    assert len(program.layers) > 6
    monkeypatch.setattr(Segment, "_run", lambda self, program, inputs, nanoseconds: [nanoseconds.fill_(10**6)])
    _, times = segment.timed(packed, (), *run.rest)
    assert times == {layer: pytest.approx(program.layers.count(layer)) for layer in set(program.layers) if layer}


def test_leaving_the_program_costs_a_large_batch() -> None:
    """A library's layer ends the slices around it; with one image, or few activations, there are none."""
    library, ours = get("onednn_nhwc"), get("pointwise_nhwc")
    large = ConvProblem(mb=8, ic=16, ih=112, iw=112, oc=96, kh=1, kw=1)
    here = replace(cpu(), threads=2)
    assert leaving_ms(ours, large, here) == 0
    assert leaving_ms(library, large, here) > 1
    assert leaving_ms(library, large.with_batch(1), here) == 0
    assert leaving_ms(library, ConvProblem(mb=8, ic=16, ih=7, iw=7, oc=16, kh=1, kw=1), here) == 0
