"""PyTorch's own samples of its operators and modules, each as eager runs it: values, strides, and shared memory.

Convolutions with parameters take all samples in all layouts; elsewhere layouts take turns, and `-m slow` takes all.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from behaviour import check, only_errors
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.testing._internal.opinfo.core import OpInfo

import convselect

# torch's test utilities, when imported, forbid everybody to set switches such as `torch.backends.cudnn.benchmark`.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
FUNCTIONS = tuple(
    (
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_unpool2d linear "
        "bilinear batch_norm group_norm instance_norm layer_norm rms_norm local_response_norm normalize interpolate "
        "upsample_bilinear upsample_nearest relu relu6 leaky_relu elu celu selu gelu glu silu mish hardswish "
        "hardsigmoid hardtanh hardshrink softshrink softplus softsign softmin tanhshrink threshold logsigmoid prelu "
        "pad pixel_shuffle pixel_unshuffle channel_shuffle unfold grid_sample scaled_dot_product_attention"
    ).split()
)
OPERATORS = tuple(
    (
        "cat stack mean sum amax var add sub mul div maximum minimum clamp clamp_max clamp_min sigmoid tanh exp neg "
        "abs softmax flatten unflatten view reshape permute transpose squeeze unsqueeze expand expand_as chunk split "
        "split_with_sizes tensor_split narrow select slice unbind clone contiguous addmm mm bmm matmul baddbmm roll "
        "flip repeat where masked_fill lerp addcmul cumsum movedim t"
    ).split()
)
WITH_ERRORS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "group_norm", "rms_norm", "prelu")
LEFT_OUT = ("Loss", "Fractional", "Transformer", "MultiheadAttention", "RNN", "GRU", "LSTM", "Embedding")
"""Modules of no interest here, or random."""
MOST_SAMPLES = 4
"""Of an operator that is no convolution, spread evenly over its list; max_pool2d has 1,440."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "non-contiguous": lambda x: noncontiguous_like(x) if x.numel() else x,
    "no image": lambda x: x[:0] if x.dim() else x,
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with only_errors():
        yield


class Call(NamedTuple):
    """A call to `operator`."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def laid_out(self, layout: str) -> Call:
        """With the first argument, or each tensor in it if it is a list, in that layout."""
        change = LAYOUTS[layout]
        first = self.args[0]
        first = change(first) if isinstance(first, Tensor) else [change(each) for each in first]
        return self._replace(args=(first, *self.args[1:]))

    def is_valid(self) -> bool:
        """Whether eager runs it."""
        try:
            self.operator(*self.args, **self.kwargs)
        except (RuntimeError, ValueError, IndexError):
            return False
        return True


class Calls:
    """A module whose `forward` makes all `calls`, with its inputs.

    The tensors of a call are inputs, or only those in its first argument where `weights`: then others are parameters.
    """

    def __init__(self, calls: Sequence[Call], weights: bool) -> None:
        self.inputs: list[Tensor] = []
        self.weights: dict[str, nn.Parameter] = {}
        space: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan}
        lines = []
        for i, call in enumerate(calls):
            first, *others = call.args
            words = [self._text(first, False), *(self._text(value, weights) for value in others)]
            words += [f"{name}={self._text(value, weights)}" for name, value in call.kwargs.items()]
            lines.append(f"        {'self.' * isinstance(call.operator, nn.Module)}call{i}({', '.join(words)}),\n")
            space[f"call{i}"] = call.operator
        self.source = f"def forward(self, *x):\n    return (\n{''.join(lines)}    )\n"
        exec(self.source, space)
        self.module: nn.Module = type("Calls", (nn.Module,), {"forward": space["forward"]})()
        for name, value in (*self.weights.items(), *space.items()):
            if isinstance(value, (nn.Module, nn.Parameter)):
                setattr(self.module, name, value)

    def _text(self, value: Any, weights: bool) -> str:
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{self._text(each, weights)}, " for each in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if not isinstance(value, Tensor):
            return repr(value)
        if weights and value.is_floating_point():
            name = f"w{len(self.weights)}"
            self.weights[name] = nn.Parameter(value, requires_grad=False)
            return f"self.{name}"
        self.inputs.append(value)
        return f"x[{len(self.inputs) - 1}]"


def check_calls(calls: Sequence[Call], weights: bool) -> None:
    """All of them in one module; where that fails, one by one, so that it is seen which one it is."""
    torch._dynamo.reset()
    made = Calls(calls, weights)
    if weights:
        fast = convselect.compile(made.module, calibrate="never")
    else:
        fast = torch.compile(made.module, backend="convselect", options={"calibrate": "never"})
    try:
        with torch.inference_mode():
            for _ in range(2):
                check(made.module, made.inputs, fast, lambda: torch.compile(made.module, backend="aot_eager"))
    except Exception as error:
        if len(calls) > 1:
            for call in calls:
                check_calls([call], weights)
        given = [(tuple(x.shape), x.stride(), x.dtype) for x in made.inputs]
        pytest.fail(f"{error}\n\n{made.source}\ncalled with {given}, weights {weights}")


def infos(names: Sequence[str], prefix: str = "") -> list[Any]:
    """PyTorch's descriptions of operators, as parameters of a test."""
    found = [info for info in op_db if info.name.removeprefix(prefix) in names and info.name.startswith(prefix)]
    assert {info.name.removeprefix(prefix) for info in found} == set(names)
    return [pytest.param(info, id=f"{info.name} {info.variant_test_name}".strip()) for info in found]


def together(parameters: Sequence[Any]) -> list[Any]:
    """Five at a time: a module of many calls compiles in half the time of many modules."""
    groups = [parameters[start : start + 5] for start in range(0, len(parameters), 5)]
    return [
        pytest.param([each.values[0] for each in group], id=" ".join(each.id for each in group)) for group in groups
    ]


def calls_of(info: OpInfo, dtype: torch.dtype = torch.float32) -> list[Call]:
    torch.manual_seed(0)
    samples = info.sample_inputs("cpu", dtype)
    return [Call(info.op, (sample.input, *sample.args), sample.kwargs) for sample in samples]


def crossed(calls: Sequence[Call]) -> list[Call]:
    """Each call in each layout in which eager runs it."""
    laid_out = [call.laid_out(layout) for call in calls for layout in LAYOUTS]
    return [call for call in laid_out if call.is_valid()]


def in_turn(calls: Sequence[Call]) -> list[Call]:
    """A few calls, each in one layout, or as it is where eager does not run that."""
    few = calls[:: math.ceil(len(calls) / MOST_SAMPLES)]
    laid_out = [call.laid_out(layout) for call, layout in zip(few, itertools.cycle(LAYOUTS), strict=False)]
    return [changed if changed.is_valid() else call for call, changed in zip(few, laid_out, strict=True)]


@pytest.mark.parametrize("weights", [True, False], ids=["parameters", "inputs"])
@pytest.mark.parametrize("info", infos(CONVOLUTIONS, "nn.functional."))
def test_convolutions(info: OpInfo, weights: bool) -> None:
    check_calls(crossed(calls_of(info)) if weights else in_turn(calls_of(info)), weights)


@pytest.mark.parametrize("some", together(infos(FUNCTIONS, "nn.functional.") + infos(OPERATORS)))
def test_functions(some: Sequence[OpInfo]) -> None:
    check_calls([call for info in some for call in in_turn(calls_of(info))], weights=True)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [True, False], ids=["parameters", "inputs"])
@pytest.mark.parametrize("info", infos(CONVOLUTIONS + FUNCTIONS, "nn.functional.") + infos(OPERATORS))
def test_all_samples(info: OpInfo, weights: bool) -> None:
    calls = crossed(calls_of(info))
    for start in range(0, len(calls), 50):
        check_calls(calls[start : start + 50], weights)


def module_calls(info: ModuleInfo) -> list[Call]:
    """Calls of the modules that PyTorch tests a class with; lazy ones have been called before."""
    calls = []
    for sample in info.module_inputs_func(info, "cpu", torch.float32, False, False):
        torch.manual_seed(0)
        module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).eval()
        given = inspect.signature(module.forward).bind(*sample.forward_input.args, **sample.forward_input.kwargs)
        call = Call(module, given.args, given.kwargs)
        call.operator(*call.args, **call.kwargs)
        calls.append(call)
    return calls


MODULES = [pytest.param(info, id=info.name) for info in module_db if not any(name in info.name for name in LEFT_OUT)]


@pytest.mark.parametrize("some", together(MODULES))
def test_modules(some: Sequence[ModuleInfo]) -> None:
    check_calls([call for info in some for call in in_turn(module_calls(info))], weights=True)


def outcome(call: Callable[..., object], inputs: Sequence[Tensor]) -> tuple[type, str] | None:
    """What a call raises."""
    try:
        call(*inputs)
    except Exception as error:
        return type(error), str(error).replace("backend='convselect'", "backend='aot_eager'")
    return None


@pytest.mark.parametrize("info", infos(CONVOLUTIONS[:3] + WITH_ERRORS, "nn.functional.") + infos(("cat", "mean")))
def test_errors(info: OpInfo) -> None:
    """Invalid inputs raise what they raise in eager, or where Dynamo has a word to say, what `aot_eager` raises."""
    seen = 0
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        made = Calls([Call(info.op, (sample.input, *sample.args), sample.kwargs)], weights=False)
        expected = outcome(made.module, made.inputs)
        if expected is None:  # an error on other devices
            continue
        torch._dynamo.reset()
        got = outcome(convselect.compile(made.module, calibrate="never"), made.inputs)
        if got != expected:
            torch._dynamo.reset()
            assert got == outcome(torch.compile(made.module, backend="aot_eager"), made.inputs), made.source
        seen += 1
    assert seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("info", infos(("conv2d", "linear", "batch_norm"), "nn.functional."))
def test_other_types(info: OpInfo, dtype: torch.dtype) -> None:
    check_calls(in_turn(calls_of(info, dtype)), weights=True)
