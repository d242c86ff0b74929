"""What fails once: the exception arrives, nothing is the worse for it, and the next call is right."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_up import choose
from torch import nn

import convselect
from convselect import choices
from convselect.graph.program.segment import Segment
from convselect.primitives.kernel import KernelPrimitive

STATM = Path("/proc/self/statm")
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.MaxPool2d(2)
    ).eval()


@pytest.fixture
def model() -> nn.Sequential:
    torch._dynamo.reset()
    return network()


def compiled(model: nn.Module) -> Callable[..., torch.Tensor]:
    return convselect.compile(model, calibrate="never", strict=True)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Fault(Exception):
    pass


class Trap:
    """In place of a function: raises `error` the `at`th time from when it was set, and then no more."""

    def __init__(self, patch: pytest.MonkeyPatch, where: object, name: str) -> None:
        self.original, self.left, self.error = getattr(where, name), 0, Fault()
        patch.setattr(where, name, lambda *args, **kwargs: self.call(*args, **kwargs))

    def set(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error

    def call(self, *args: object, **kwargs: object) -> object:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("error", [Fault("no luck"), MemoryError("no memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [1, 2])
@torch.inference_mode()
def test_packing_fails(model: nn.Module, at: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is first done, at either convolution, and when it is done again."""
    choose(monkeypatch, "direct_nhwc")
    packing, fast = Trap(monkeypatch, KernelPrimitive, "prepack"), compiled(model)
    packing.set(at, error)
    with pytest.raises(type(error)):
        fast(X)
    close(fast(X), model(X))
    with torch.inference_mode(False), torch.no_grad():
        model[0].weight.mul_(2)
    packing.set(at, error)
    with pytest.raises(type(error)):
        fast(X)
    for _ in range(3):
        close(fast(X), model(X))
    assert packing.left == -2, "both are packed once more, and not again"


@pytest.mark.parametrize("at", [1, 2, 3, 6])
@torch.inference_mode()
def test_a_run_fails(model: nn.Module, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, which is made with the program, those that go through Dynamo, and those that do not."""
    choose(monkeypatch, "direct_nhwc")
    fast, want = compiled(model), model(X)
    Trap(monkeypatch, Segment, "_run").set(at, Fault("no luck"))
    for number in range(1, 9):
        if number == at:
            with pytest.raises(Fault):
                fast(X)
        else:
            close(fast(X), want)


@torch.inference_mode()
def test_a_selection_fails(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(model)
    Trap(monkeypatch, choices, "predict").set(1, ValueError("no luck"))
    with pytest.raises(ValueError, match="no luck"):
        fast(X)
    close(fast(X), model(X))


SCARCE = """
import resource, torch
from pathlib import Path
from torch import nn

import convselect
from convselect.machine import cpu
from convselect.primitive import IDENTITY, primitives
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

LIMIT = resource.RLIMIT_AS
unlimited = resource.getrlimit(LIMIT)


def limit(more_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(LIMIT, (pages * resource.getpagesize() + more_bytes, unlimited[1]))


def fails(call) -> bool:
    try:
        call()
    except (RuntimeError, MemoryError):
        return True
    return False


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
fast = convselect.compile(model, calibrate="never", strict=True)
small, large = torch.randn(24, 3, 24, 24), torch.randn(700, 3, 24, 24)  # whose result has 98 MiB
problem = ConvProblem(ic=16, ih=12, iw=12, oc=16, kh=3, kw=3, ph=1, pw=1)
wide = ConvProblem(ic=16, ih=1024, iw=1024, oc=16, kh=3, kw=3, ph=1, pw=1)  # a result of 64 MiB
kernels = [k for k in primitives() if isinstance(k, KernelPrimitive) and k.refusal(problem, cpu()) is None]
weight, src, wide_src = torch.randn(16, 16, 3, 3), torch.randn(1, 16, 12, 12), torch.randn(1, 16, 1024, 1024)
with torch.inference_mode():
    assert len(kernels) > 10
    for x in (small[:1], small, small[:1]):
        fast(x)
    want = fast(small)
    runs = {}
    for k in kernels:
        packed, order = k.prepack(problem, weight), k.src_layout.memory_format
        near, far = src.contiguous(memory_format=order), wide_src.contiguous(memory_format=order)
        runs[k.name] = [
            lambda k=k, p=p, x=x, packed=packed: k.run(p, IDENTITY, x, packed, None, None)
            for p, x in ((problem, near), (wide, far))
        ]
    results = {name: near() for name, (near, _) in runs.items()}
    limit(32 << 20)
    try:
        assert fails(lambda: fast(large)), "the limit limits"
        failed = [fails(far) for _, far in runs.values()]
        now = fast(small)
        again = {name: near() for name, (near, _) in runs.items()}
        with torch.inference_mode(False), torch.no_grad():
            model[0].weight.add_(0.0)  # is packed again
        repacked = fast(small)
    finally:
        resource.setrlimit(LIMIT, unlimited)
    assert all(failed), failed
    assert torch.equal(now, want) and torch.equal(repacked, want)
    assert all(torch.equal(again[name], result) for name, result in results.items())
    torch.testing.assert_close(fast(large), model(large), rtol=1e-4, atol=1e-4)
print("passed")
"""


@pytest.mark.heavy
@pytest.mark.skipif(not STATM.exists(), reason="how much memory is in use is read from /proc")
def test_memory_is_not_to_be_had() -> None:
    done = subprocess.run([sys.executable, "-c", SCARCE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr[-3000:]


@pytest.mark.heavy
@pytest.mark.skipif(not STATM.exists(), reason="how much memory is in use is read from /proc")
@torch.inference_mode()
def test_ten_thousand_calls_need_no_more_memory(model: nn.Module, set_threads: Callable[[int], None]) -> None:
    """Of several batches, and with weights that change."""
    set_threads(1)
    fast = compiled(model)
    batches = [X[:1], X, torch.cat([X, X])]

    def calls(count: int) -> None:
        for i in range(count):
            fast(batches[i % 3])
            if i % 50 == 0:
                model[0].weight.data.neg_()

    def resident_mib() -> float:
        gc.collect()
        return int(STATM.read_text().split()[1]) * 4096 / 2**20

    calls(1_000)
    before = resident_mib()
    calls(10_000)
    assert resident_mib() - before < 2
