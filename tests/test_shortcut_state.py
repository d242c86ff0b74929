"""What no dictionary shows is seen too: modes, hooks, transforms. Threads stand apart, and all ends with the model."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from watched import Net, X, close, compiled

import convselect
from convselect.runtime.compiled import recording, run_graphs


@pytest.fixture
def net() -> Net:
    torch._dynamo.reset()
    return Net()


@torch.inference_mode()
def test_autocast_is_seen(net: Net) -> None:
    fast = compiled(net)
    for _ in range(2):
        assert fast(X).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        want = net(X)
        with pytest.warns(convselect.ConvselectWarning, match="bfloat16"):
            got = fast(X)
    assert got.dtype == want.dtype


class PartlyExact(nn.Module):
    """A product that no autocast may touch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.randn(36, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.conv(x).mean(1).flatten(1) @ self.weight


def test_under_autocast_a_graph_has_its_own_casts() -> None:
    torch._dynamo.reset()
    model, x = PartlyExact().eval(), torch.randn(2, 3, 8, 8)
    fast = convselect.compile(model, calibrate="never")
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class Plain(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return func(*args, **(kwargs or {}))


class Instead(TorchFunctionMode):
    """Calls another function where `F.relu` is called."""

    def __init__(self, other: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.other = other

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return self.other(args[0]) if func is F.relu else func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_mode_has_its_own_way(net: Net) -> None:
    fast = compiled(net)
    for mode in (Plain(), Instead(torch.tanh), Plain(), Instead(torch.sigmoid)):
        for _ in range(2):
            with mode:
                close(fast(X), net(X))
    for _ in range(2):
        close(fast(X), net(X))


class Shifted(nn.Module):
    """Makes a tensor on the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + torch.ones(1)


@torch.inference_mode()
def test_a_default_device_is_a_mode() -> None:
    model = Shifted()
    fast = compiled(model)
    for _ in range(2):
        with torch.device("cpu"):
            close(fast(X), model(X))
    for _ in range(2):
        close(fast(X), model(X))
    with pytest.raises(RuntimeError), torch.device("meta"):
        fast(X)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@torch.inference_mode()
def test_hooks_on_all_modules_run_each_time(net: Net) -> None:
    fast = compiled(net)
    seen: list[nn.Module] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        for calls in range(1, 4):
            fast(X)
            assert seen.count(net) == calls


def test_transforms(net: Net) -> None:
    fast = compiled(net)
    images = torch.randn(2, *X.shape)
    with torch.no_grad():
        for _ in range(2):
            close(fast(X), net(X))
            close(torch.func.vmap(fast)(images), torch.func.vmap(net)(images))


@torch.inference_mode()
def test_a_stance_is_obeyed(net: Net) -> None:
    fast = compiled(net)
    for _ in range(2):
        with torch.compiler.set_stance("force_eager"), recording() as ran:
            close(fast(X), net(X))
        assert not ran
    with recording() as ran:
        fast(X)
    assert ran


def in_threads(fast: Callable[..., torch.Tensor], count: int) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []

    def call() -> None:
        with torch.inference_mode():
            results.append(fast(X))

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_first_calls_do_not_wait_for_each_other(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20)
    original = convselect.runtime.shortcut.OptimizedModule.__call__

    def meet(self: nn.Module, *args: object) -> object:
        both.wait()
        return original(self, *args)

    monkeypatch.setattr(convselect.runtime.shortcut.OptimizedModule, "__call__", meet)
    fast = compiled(net)
    results = in_threads(fast, 2)
    assert len(results) == 2
    for result in results:
        close(result, net(X).detach())


def test_what_another_thread_runs_is_not_recorded(net: Net) -> None:
    fast = compiled(net)
    with recording() as ran:
        assert len(in_threads(fast, 1)) == 1
    assert not ran


@pytest.mark.parametrize("short", [True, False])
def test_a_model_goes_with_what_was_made_of_it(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convselect.runtime.shortcut, "missing", lambda: None if short else "asked for")
    model = Net()
    fast = compiled(model)
    with torch.inference_mode():
        for _ in range(2):
            gc.collect()
            fast(X)
        graph = weakref.ref(run_graphs(fast, [X])[0].graph)  # it holds packed weights and the arenas
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert graph() is not None
    del fast
    gc.collect()
    assert graph() is None
    assert [weight() for weight in weights] == [None] * len(weights)


def saved_and_loaded(fast: object) -> Callable[..., torch.Tensor]:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, saved_and_loaded])
def test_a_copy_stands_alone(make_copy: Callable[..., Callable[..., torch.Tensor]]) -> None:
    model = Net()
    fast = compiled(model)
    with torch.inference_mode():
        want = fast(X)
    other = make_copy(fast)
    with torch.no_grad():
        model.conv.weight.zero_()
    del fast
    gc.collect()
    with torch.inference_mode():
        for _ in range(2):
            close(other(X), want)
