"""A shortcut must never run what Dynamo would not have run: every change that a guard sees is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import watched
from torch import nn
from watched import Net, X, close, compiled, shortcuts

import convselect
from convselect.runtime import changes
from convselect.runtime.shortcut import Shortcut, Shortcuts

pytestmark = pytest.mark.skipif(changes.missing() is not None, reason=str(changes.missing()))


@pytest.fixture
def net() -> Net:
    torch._dynamo.reset()  # once one test has changed `scale`, Dynamo would pass it as an input
    return Net()


@torch.inference_mode()
def test_a_repeated_call_is_short(net: Net, guarded: list[int]) -> None:
    fast = compiled(net)
    with torch.inference_mode(False):
        others = [torch.randn_like(X) for _ in range(3)]
    for _ in range(2):  # the second confirms what was learnt from the first
        close(fast(X), net(X))
    assert len(guarded) == 2
    for other in others:
        close(fast(other), net(other))
    assert len(guarded) == 2
    assert isinstance(shortcuts(fast)[0], Shortcut)


class Outer(nn.Module):
    """The globals of its blocks are read through their Python module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


@pytest.mark.parametrize("make", [Net, Outer])
@torch.inference_mode()
def test_globals_that_no_guard_reads_may_change(make: Callable[[], nn.Module], guarded: list[int]) -> None:
    torch._dynamo.reset()
    model = make()
    fast = compiled(model)
    for watched.UNREAD in range(4):  # as the variables of a loop at the top level of a script
        close(fast(X), model(X))
    assert len(guarded) == 2


@torch.inference_mode()
def test_what_changes_all_the_time_is_no_longer_learnt(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[int] = []
    learn = Shortcuts._learn
    monkeypatch.setattr(Shortcuts, "_learn", lambda *args: learnt.append(1) or learn(*args))
    fast = compiled(net)
    for i in range(10):
        net.unread = i
        close(fast(X), net(X))
    assert len(learnt) == Shortcuts.PATIENCE + 1
    assert shortcuts(fast) == [None]


@torch.inference_mode()
def test_what_pays_is_learnt_again(net: Net) -> None:
    fast = compiled(net)
    for i in range(2 * Shortcuts.PATIENCE):
        net.unread = i
        for _ in range(2 + Shortcuts.WORTH):  # it is learnt and confirmed by the first two
            fast(X)
    assert isinstance(shortcuts(fast)[0], Shortcut)


def set_global(net: Net) -> None:
    watched.SCALE += 1.0


CHANGES: dict[str, Callable[[Net], object]] = {
    "attribute": lambda net: setattr(net, "scale", 3.0),
    "tuple": lambda net: setattr(net, "pair", (1.0, 5.0)),
    "item": lambda net: net.config.__setitem__("negate", True),
    "stride": lambda net: setattr(net.conv, "stride", (2, 2)),
    "module": lambda net: setattr(net, "conv", nn.Conv2d(3, 16, 3, padding=1)),
    "item of _modules": lambda net: net._modules.__setitem__("conv", nn.Conv2d(3, 16, 3, padding=1)),
    "parameter": lambda net: setattr(net.conv, "weight", nn.Parameter(torch.randn(16, 3, 3, 3))),
    "in place": lambda net: net.conv.weight.data.mul_(2),
    "data": lambda net: setattr(net.conv.weight, "data", torch.randn(16, 3, 3, 3)),
    "no bias": lambda net: setattr(net.conv, "bias", None),
    "buffer": lambda net: net.norm.running_mean.add_(1),
    "state": lambda net: net.load_state_dict(Net().state_dict()),
    "global": set_global,
    "outer hook": lambda net: net.register_forward_hook(lambda module, args, result: result + 1),
    "outer pre-hook": lambda net: net.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "forward": lambda net: setattr(net.norm, "forward", lambda x: x + 1),
    "double": lambda net: net.config.update(negate=True),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_a_change_is_seen(net: Net, change: str) -> None:
    fast = compiled(net)
    for _ in range(2):
        close(fast(X), net(X))
    (shortcut,) = shortcuts(fast)
    assert isinstance(shortcut, Shortcut)
    assert shortcut.confirmed
    before = net(X)
    with torch.inference_mode(False), torch.no_grad():
        CHANGES[change](net)
    after = net(X)
    assert after.shape != before.shape or not torch.allclose(after, before)
    for _ in range(3):
        close(fast(X), after)


@torch.inference_mode()
def test_training_and_back(net: Net) -> None:
    fast = compiled(net)
    for _ in range(2):
        fast(X)
    net.train()
    mean = net.norm.running_mean.clone()
    with torch.inference_mode(False), torch.no_grad():
        fast(X)
    assert not torch.equal(mean, net.norm.running_mean)
    net.eval()
    close(fast(X), net(X))


def test_what_has_no_shortcut_bars_none(net: Net, guarded: list[int]) -> None:
    fast = compiled(net)
    with pytest.warns(convselect.ConvselectWarning, match="gradients"):
        fast(X)
    net.train()
    with torch.no_grad():
        fast(X)
    net.eval()
    with torch.inference_mode():
        for _ in range(3):
            close(fast(X), net(X))
        before = len(guarded)
        close(fast(X), net(X))
    assert len(guarded) == before


@torch.inference_mode()
def test_a_hook_on_the_result_of_compile_runs_each_time(net: Net) -> None:
    fast = compiled(net)
    for _ in range(2):
        fast(X)
    seen: list[int] = []
    fast.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        fast(X)
    assert len(seen) == 2


@torch.inference_mode()
def test_a_monkeypatched_function_is_seen(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(net)
    for _ in range(2):
        fast(X)
    monkeypatch.setattr(F, "relu", torch.tanh)
    close(fast(X), net(X))


@torch.inference_mode()
def test_arguments_decide(net: Net) -> None:
    fast = compiled(net)
    nhwc = X.contiguous(memory_format=torch.channels_last)
    others = (torch.randn(2, 3, 8, 9), torch.randn(1, 3, 9, 8).mT, torch.randn(1, 3, 5, 6), nhwc)
    calls = [(X,), (X, True), (X, False), *((other,) for other in others)]
    for _ in range(3):
        for args in calls:
            close(fast(*args), net(*args))
    close(fast(X, twice=True), net(X, twice=True))


def test_gradients_still_come(net: Net) -> None:
    fast = compiled(net)
    with torch.inference_mode():
        for _ in range(2):
            fast(X)
    with pytest.warns(convselect.ConvselectWarning, match="gradients"):
        fast(X).sum().backward()
    assert net.conv.weight.grad is not None


class Impure(nn.Module):
    """Does more than compute: each call must do it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.kind, self.count, self.log = kind, 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.kind == "attribute":
            self.count += 1
        elif self.kind == "list":
            self.log.append(1)
        elif self.kind == "buffer":
            self.total += 1
        elif self.kind == "break":
            torch._dynamo.graph_break()
            self.count += 1
        return x

    def effects(self) -> float:
        return self.count + len(self.log) + float(self.total)


@pytest.mark.parametrize("kind", ["attribute", "list", "buffer", "break"])
def test_side_effects_happen_each_time(kind: str) -> None:
    model = Impure(kind)
    fast = compiled(model)
    with torch.no_grad():
        for calls in range(1, 5):
            fast(X)
            assert model.effects() == calls


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = self.conv(x)
        return {"out": y, "more": [F.relu(y), y.mean()]}


@torch.inference_mode()
def test_structured_results() -> None:
    model = Structured()
    fast = compiled(model)
    for _ in range(3):
        got, want = fast(X), model(X)
        close(got["out"], want["out"])
        close(got["more"][0], want["more"][0])
        close(got["more"][1], want["more"][1])


@torch.inference_mode()
def test_results_are_the_callers_own(net: Net) -> None:
    fast = compiled(net)
    fast(X)
    first = fast(X)
    kept = first.clone()
    second = fast(X)
    second.zero_()
    assert torch.equal(first, kept)


@torch.no_grad()
def test_copies_are_independent(net: Net) -> None:
    fast = compiled(net)
    for _ in range(2):
        fast(X)
    other = copy.deepcopy(net)
    other.conv.weight.mul_(3)
    fast_other = compiled(other)
    for _ in range(2):
        close(fast_other(X), other(X))
        close(fast(X), net(X))
