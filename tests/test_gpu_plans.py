"""Plans for GPUs without one: graphs of fake CUDA tensors, and networks whose GPU primitives Triton interprets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from gpu import machine
from test_cuda_graphs import Pretended
from torch import nn
from torch.fx import Graph

import convselect
from convselect import backend
from convselect.backend import Backend, Prepared, _prepacks, captured
from convselect.choices import Choices, choices_for
from convselect.graph.assign import Assignment, OperatorCosts, assign
from convselect.graph.constants import pack
from convselect.graph.fold import fold_batch_norm, scale_and_shift
from convselect.graph.lower import Call, Lowered, ScaleShift, lower, to_layout
from convselect.graph.remainder import traced
from convselect.graph.target import Target, target_of
from convselect.layout import Layout
from convselect.machine import Gpu
from convselect.options import Options
from convselect.primitives.gpu import base
from convselect.problem import ConvProblem
from convselect.runtime.compiled import run_graphs
from convselect.runtime.cuda_graphs import CAPTURED


class Small(nn.Module):
    """A stem, a residual, a depthwise convolution, a norm that nothing absorbs, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.alone = nn.BatchNorm2d(16)
        self.c = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.a(x) + x)
        x = torch.relu(self.alone(x + self.b(x)))
        x = nn.functional.max_pool2d(self.c(x), 3, 2, 1)
        return self.head(x.mean((2, 3)))


def moved(graph: Graph, device: str, last: str | None = None) -> Target | str:
    """`target_of(graph)` after its fake values were moved to `device`, and the last convolution's source to `last`.

    torch for CPUs has fake CUDA tensors, but cannot functionalise a graph of them.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            with value.fake_mode:
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    if last is not None:
        source = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)[-1].args[0]
        with source.meta["val"].fake_mode:
            source.meta["val"] = source.meta["val"].to(last)
    return target_of(graph)


def fake(
    dtype: torch.dtype = torch.float32,
    *,
    make: Callable[[], nn.Module] = Small,
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
) -> list[Prepared]:
    """What is captured of the model on a GPU. It is traced on the CPU."""
    torch._dynamo.reset()
    model, x = make().to(dtype).eval(), torch.zeros(2, 3, 32, 32, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    on_a_gpu = mock.patch("convselect.backend.target_of", partial(moved, device="cuda:0"))
    with on_a_gpu, torch.autocast("cpu", autocast, enabled=autocast is not None):
        return captured(model, x)


def planned(prepared: Prepared, here: Gpu, layout: Layout | None = None) -> tuple[Choices, Assignment, Lowered]:
    """A plan for `here`, of primitives that read and write `layout` only, where one is given."""
    choices = choices_for([spec.problem for spec in prepared.convs.values()], Options(calibrate="never"), here)
    candidates = {
        node: [c for c in choices.candidates[spec.problem] if layout in (None, c.primitive.src_layout)]
        for node, spec in prepared.convs.items()
    }
    assignment = assign(prepared.graph, candidates, OperatorCosts(choices.costs.operator_ms))
    mode = torch._guards.detect_fake_mode([node.meta.get("val") for node in prepared.graph.nodes])
    with mode:
        return choices, assignment, lower(prepared.graph, assignment.chosen, 2 * len(candidates) + 4)


def targets(lowered: Lowered) -> list[object]:
    return [node.target for node in lowered.module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16", "bfloat16"])
def test_a_plan_of_gpu_primitives(precision: str) -> None:
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    (prepared,) = fake(dtype)
    assert not prepared.others
    choices, assignment, lowered = planned(prepared, machine(precision))
    chosen = [option.candidate.primitive for option in assignment.chosen.values() if option.candidate]
    assert len(chosen) == 4
    assert {primitive.device for primitive in chosen} == {"cuda"}
    names = {c.primitive.name for every in choices.candidates.values() for c in every}
    if precision in ("float16", "bfloat16"):
        assert not any("f4x4" in name for name in names)
        assert any("float16" not in reason for reason in choices.refusals[next(iter(choices.refusals))].values())
    called = targets(lowered)
    assert sum(isinstance(target, Call) for target in called) == 4
    assert sum(isinstance(target, ScaleShift) for target in called) == 1
    ours = [target for target in called if "convselect" in str(target) and not isinstance(target, (Call, ScaleShift))]
    assert not ours, "an operator of the CPU's"
    assert choices.costs.machine.precision == precision


def test_half_weights_are_half_as_large_and_their_folded_bias_is_not_rounded() -> None:
    (single,), (half,) = fake(), fake(torch.float16)
    _, of_single, _ = planned(single, machine("float32"))
    _, of_half, _ = planned(half, machine("float16"))
    bytes_of = [
        {c.primitive.name: c.packed_bytes for node in g.convs for c in choices.candidates[g.convs[node].problem]}
        for g, choices in ((single, planned(single, machine())[0]), (half, planned(half, machine("float16"))[0]))
    ]
    assert bytes_of[1]["cudnn_nchw"] * 2 == bytes_of[0]["cudnn_nchw"]
    assert of_single.chosen.keys() != of_half.chosen.keys()
    gamma, beta, mean, var = (torch.rand(4) + 0.5 for _ in range(4))
    weight, bias = fold_batch_norm(torch.randn(4, 3, 1, 1).half(), None, gamma, beta, mean, var, 1e-5)
    assert (weight.dtype, bias.dtype) == (torch.float16, torch.float32)


def test_channels_last_inputs_are_taken_as_they_are() -> None:
    (prepared,) = fake(torch.float16, channels_last=True)
    _, assignment, lowered = planned(prepared, machine("float16"), Layout.NHWC)
    first = assignment.chosen[next(iter(prepared.convs))]
    assert first.reads is Layout.NHWC
    assert to_layout not in targets(lowered)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """The convolutions are half, their weights casts of float32 parameters that are folded away."""
    (prepared,) = fake(autocast=dtype)
    assert not prepared.others
    assert len(prepared.convs) == 4
    assert {node.meta["val"].dtype for node in prepared.convs} == {dtype}
    kept = [node for node in prepared.graph.nodes if node.target is torch.ops.aten._to_copy.default]
    assert not [node for node in kept if node.args[0].op == "placeholder" and node.args[0].meta["val"].dim() == 1]
    assert len(prepared.positions) >= 4 + 3 + 8, "weights, biases and two norms"
    planned(prepared, machine(str(dtype).removeprefix("torch.")))


class Interpreted(Backend):
    """Plans for a GPU and runs them on the CPU, in Triton's interpreter; only those of `family`, where it can run."""

    def __init__(self, family: str, here: Gpu, remainder: str = "eager") -> None:
        super().__init__(Options(calibrate="never", strict=True, remainder=remainder))
        self.family, self.here = family, here

    def choices(self, problems: Sequence[ConvProblem], target: Target) -> Choices:
        choices = choices_for(problems, self.options, self.here)
        wanted = {
            p: [c for c in every if c.primitive.family == self.family] or every
            for p, every in choices.candidates.items()
        }
        return replace(choices, candidates=wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there: tests/test_gpu_runs.py")
@pytest.mark.parametrize(
    ("family", "channels_last", "remainder"),
    [
        ("igemm", True, "eager"),
        pytest.param("winograd", True, "eager", marks=pytest.mark.slow),
        pytest.param("im2row", False, "eager", marks=pytest.mark.slow),
        pytest.param("igemm", False, "eager", marks=pytest.mark.slow),
        pytest.param("any", True, "eager", marks=pytest.mark.slow),
        pytest.param("winograd", False, "eager", marks=pytest.mark.slow),
        pytest.param("im2row", True, "eager", marks=pytest.mark.slow),
        pytest.param("any", False, "eager", marks=pytest.mark.slow),
        ("any", False, "inductor"),
    ],
)
def test_interpreted_networks_agree_with_float64(
    family: str, channels_last: bool, remainder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(base, "tf32_allowed", lambda: False)  # as the machine says
    torch.manual_seed(0)
    model = Small().eval()
    for norm in (model.norm, model.alone):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(2, 3, 16, 16)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    torch._dynamo.reset()
    fast = torch.compile(model, backend=Interpreted(family, machine(), remainder))
    with torch.inference_mode():
        for _ in range(2):
            got = fast(x)
            exact = model.double()(x.double())
            model.float()
            assert (got - exact).norm() / exact.norm() < 5e-6
            model.a.weight.mul_(2)
    layers = [layer for run in run_graphs(fast, [x]) for layer in run.graph.plan.layers]
    assert len(layers) == 4
    assert family == "any" or family in {layer.family for layer in layers}


class Graphed(Target):
    """The CPU, where graphs are captured as on a GPU."""

    is_gpu = True


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there: tests/test_gpu_runs.py")
def test_what_cannot_be_captured_is_told_once_and_stands_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under `strict`, as it is converted."""
    pytest.importorskip("triton")
    device = Pretended()
    device.error = RuntimeError("no memory")
    monkeypatch.setattr(backend, "Cuda", lambda _: device)
    monkeypatch.setattr(backend, "target_of", lambda graph: Graphed(torch.device("cpu"), torch.float32))
    torch._dynamo.reset()
    model, x = Small().eval(), torch.randn(2, 3, 16, 16)
    fast = torch.compile(model, backend=Interpreted("any", machine()))
    with torch.inference_mode(), pytest.warns(convselect.ConvselectWarning, match="inputs of 2x3x16x16 run") as told:
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(told) == 1
    (run,) = run_graphs(fast, [x])
    assert run.graph.plan.cuda_graph == f"{CAPTURED}; {told[0].message}"


def test_inductor_gets_one_operator_for_each_convolution() -> None:
    """The rest is ATen's, and a batch norm that nothing absorbs is open to fusion."""
    pytest.importorskip("triton")
    (prepared,) = fake(torch.float16)
    _, assignment, _ = planned(prepared, machine("float16"))
    prepacks = _prepacks(prepared.graph, assignment)
    mode = torch._guards.detect_fake_mode([node.meta.get("val") for node in prepared.graph.nodes])
    values = [node.meta["val"] for node in prepared.graph.find_nodes(op="placeholder")]
    weights = [torch.zeros(values[i].shape, dtype=values[i].dtype) for i in prepared.positions]
    packed = pack(prepared.fold, prepacks, weights)
    with mode:
        lowered = lower(prepared.graph, assignment.chosen, len(prepacks))
        constants = [torch.empty(one.shape, dtype=one.dtype, device="cuda:0") for one in packed]
    module, inputs = traced(lowered.module, mode, constants)
    called = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")
    assert called["convselect.gpu_conv.default"] == 4
    assert {name.split(".")[0] for name in called} <= {"convselect", "aten", "prims", "<built-in function getitem>"}
    assert sum(name.startswith("convselect") for name in called) == 1
    assert {value.device.type for value in inputs} == {"cuda"}


def test_scale_and_shift_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, interpreted, and ATen's way agree."""
    pytest.importorskip("triton")
    from convselect.primitive import Activation
    from convselect.primitives.gpu import norms

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale, shift = scale_and_shift(*(torch.rand(24) + 0.5 for _ in range(4)), 1e-5)
    scale, shift = scale.to(device), shift.to(device)
    for layout in Layout:
        for dtype in (torch.float32, torch.float16):
            src = torch.randn(2, 24, 7, 9).to(device, dtype, memory_format=layout.memory_format)
            want = norms.scale_shift(src, scale, shift, Activation("relu"))
            with monkeypatch.context() as patch:
                patch.setattr(norms, "triton_works", lambda device: True)
                got = norms.scale_shift(src, scale, shift, Activation("relu"))
            assert got.stride() == want.stride() == src.stride()
            assert got.dtype == dtype
            torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-6)
