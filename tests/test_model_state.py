"""Changes of a model that no dictionary shows, and changes that come and go: a shortcut knows of them all."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import watched
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from watched import Net, X, close, compiled, shortcuts

from convselect.runtime import changes
from convselect.runtime.model_state import ModelState
from convselect.runtime.shortcut import Shortcut, Shortcuts

pytestmark = pytest.mark.skipif(changes.missing() is not None, reason=str(changes.missing()))


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


class Negated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Slotted(nn.Module):
    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.factor


HIDDEN: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]] = {
    "class": (Net, lambda net: setattr(net.conv, "__class__", Negated)),
    "dictionary": (Net, lambda net: setattr(net.conv, "__dict__", {**net.conv.__dict__, "stride": (2, 2)})),
    "dictionary of the model": (Net, lambda net: setattr(net, "__dict__", {**net.__dict__, "scale": 3.0})),
    "slot": (Slotted, lambda net: setattr(net, "factor", 5.0)),
    "method of a class": (Net, lambda net: setattr(Net, "forward", lambda self, x: self.conv(x))),
}


@pytest.mark.parametrize("name", HIDDEN)
@torch.inference_mode()
def test_a_hidden_change_is_seen(name: str) -> None:
    make, change = HIDDEN[name]
    model = make()
    fast = compiled(model)
    for _ in range(3):
        close(fast(X), model(X))
    before = model(X)
    with torch.inference_mode(False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "forward", Net.forward)  # undone at the end
        change(model)
        with torch.inference_mode():
            after = model(X)
            assert after.shape != before.shape or not torch.allclose(after, before)
            for _ in range(3):
                close(fast(X), after)


@torch.inference_mode()
def test_other_models_may_be_compiled(guarded: list[int]) -> None:
    model = Net()
    fast = compiled(model)
    for _ in range(2):
        fast(X)
    shortcut = shortcuts(fast)[0]
    assert isinstance(shortcut, Shortcut)
    for kernel in range(1, 2 * Shortcuts.PATIENCE):
        compiled(nn.Sequential(nn.Conv2d(3, 4, kernel), nn.ReLU()))(X)
        count = len(guarded)
        close(fast(X), model(X))
        assert len(guarded) == count
    assert shortcuts(fast) == [shortcut]


class Scaled(nn.Module):
    """By an attribute and by a global."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale * watched.SCALE


@pytest.mark.parametrize("before", [0, 1, 2], ids=["learnt from", "to confirm", "short"])
@pytest.mark.parametrize("name", ["scale", "SCALE"])
@torch.inference_mode()
def test_a_change_while_a_call_runs_is_not_learnt(name: str, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's, and back again: what ran is not what would run now."""
    model = Scaled()
    owner, fast = (model if name == "scale" else watched), compiled(model)
    for _ in range(before):
        fast(X)
    value, guarded = getattr(owner, name), OptimizedModule.__call__

    def meanwhile(self: nn.Module, *args: Any) -> Any:
        setattr(owner, name, 5.0)
        result = guarded(self, *args)
        setattr(owner, name, value)
        return result

    want = model(X)
    with monkeypatch.context() as patch:
        patch.setattr(OptimizedModule, "__call__", meanwhile)
        close(fast(X), want if before == 2 else want * (5.0 / value))
    for _ in range(4):
        close(fast(X), want)


def test_states() -> None:
    model = Net()
    state = ModelState(model)
    assert state.is_current()
    before = state.changes()
    model.scale, scale = 2.0, model.scale
    assert not state.is_current()
    model.scale = scale
    assert state.is_current()
    assert state.changes() != before
    model.added = nn.ReLU()
    assert not state.is_current()
    later = ModelState(model)
    model.added.inplace = True
    assert not later.is_current()
    del model.added
    assert state.is_current(), "all is as it was at first"


@torch.inference_mode()
def test_a_state_that_is_over_keeps_nothing_alive() -> None:
    model = Net()
    fast = compiled(model)
    gone = []
    for kernel in (1, 3, 5):
        with torch.inference_mode(False):
            model.conv = nn.Conv2d(3, 16, kernel, padding=kernel // 2).eval()
        gone.append(weakref.ref(model.conv))
        for size in (9, 10):
            for _ in range(Shortcuts.WORTH + 1):
                fast(X[..., :size])
    close(fast(X), model(X))
    gc.collect()
    assert [module() is None for module in gone] == [True, True, False]
