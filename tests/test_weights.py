"""A weight may change in any way after compilation; the next call must see it."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.multiprocessing.reductions import StorageWeakRef

import convselect
from convselect.graph.constants import pack
from convselect.runtime import weights


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(2, 8, 12, 12)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.Flatten(),
        nn.Linear(6400, 4),
    ).eval()


def set_data(model: nn.Sequential) -> None:
    model[0].weight.data = randn(64, 8, 3, 3, seed=3)


def transpose_data(model: nn.Sequential) -> None:
    model[3].weight.data = model[3].weight.data.transpose(2, 3)


def replace_parameter(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(randn(64, 64, 3, 3, seed=4))


def load_state(model: nn.Sequential) -> None:
    state = {key: value + 0.5 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)


def optimiser_step(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[3].weight.mul_(2)


def one_element(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[3].weight[5, 4, 1, 1] += 100


def in_inference_mode(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model[3].bias.add_(4)


def around_autograd(model: nn.Sequential) -> None:
    model[3].weight.data.mul_(3)


def one_element_around_autograd(model: nn.Sequential) -> None:
    model[0].weight.data[0, 0, 0, 0] += 50


def corners_of_a_large_weight(model: nn.Sequential) -> None:
    weight = model[3].weight.data
    assert weight.nbytes > 64 * 1024
    weight[-1, -1, -1, -1] += 100


def by_numpy(model: nn.Sequential) -> None:
    model[0].bias.detach().numpy()[:] = np.arange(64)


def statistics(model: nn.Sequential) -> None:
    model[1].running_mean.fill_(0.7)


def swap(model: nn.Sequential) -> None:
    model[0].load_state_dict(nn.Conv2d(8, 64, 3).state_dict(), assign=True)


CHANGES: list[Callable[[nn.Sequential], None]] = [
    set_data,
    transpose_data,
    replace_parameter,
    load_state,
    optimiser_step,
    in_place,
    one_element,
    in_inference_mode,
    around_autograd,
    one_element_around_autograd,
    corners_of_a_large_weight,
    by_numpy,
    statistics,
    swap,
]


IN_PART = (one_element_around_autograd, corners_of_a_large_weight)
"""These change a line or two, which not every call looks at."""


@pytest.mark.parametrize("asked", [False, True], ids=["read", "asked"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_seen_by_the_next_call(
    change: Callable[[nn.Sequential], None], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`asked`: as where the layout of a tensor in memory is not known."""
    monkeypatch.setattr(weights, "_WHOLE_S", 0.0 if change in IN_PART else math.inf)
    if asked:
        monkeypatch.setattr("convselect.runtime.weights.metadata_of", lambda tensor: None)
    torch._dynamo.reset()
    model = network()
    fast = convselect.compile(model, calibrate="never", strict=True)
    with torch.inference_mode():
        before = fast(X)
        torch.testing.assert_close(before, model(X), rtol=1e-4, atol=1e-4)
    change(model)
    with torch.inference_mode():
        after = fast(X)
        torch.testing.assert_close(after, model(X), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", IN_PART, ids=lambda change: change.__name__)
def test_a_part_that_changed_around_autograd_is_seen_within_sixteen_calls(
    change: Callable[[nn.Sequential], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_WHOLE_S", math.inf)
    torch._dynamo.reset()
    model = network()
    fast = convselect.compile(model, calibrate="never", strict=True)
    with torch.inference_mode():
        for _ in range(20):
            fast(X)
        change(model)
        for _ in range(15):
            fast(X)
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-4)


def test_no_line_of_a_weight_is_read_twice_for_one_check() -> None:
    """Of those made under inference mode all are read at each call, of others a sixteenth."""
    with torch.inference_mode():
        unversioned = torch.randn(300, 300)
    nbytes = unversioned.nbytes
    tables = weights._State([unversioned, torch.randn(300, 300)], lambda: ())._data
    *turns, every = [table[:, 1].sum().item() for table in tables]
    assert every == nbytes
    assert turns == [weights._LINE] * weights._TURNS


def test_weights_made_under_inference_mode() -> None:
    torch._dynamo.reset()
    with torch.inference_mode():
        model = network()
        fast = convselect.compile(model, calibrate="never")
        fast(X)
        model[3].weight[7, 7, 1, 1] += 100
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-4)


def test_packing_copies() -> None:
    """What is packed must not alias a weight: a bias that does would change under the fused call."""
    torch._dynamo.reset()
    model = nn.Conv2d(8, 8, 1).eval()
    fast = convselect.compile(model, calibrate="never")
    with torch.inference_mode():
        fast(X)
    kept = copy.deepcopy(model)
    with torch.inference_mode():
        model.bias.zero_()
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-4)
        model.bias.copy_(kept.bias)
        torch.testing.assert_close(fast(X), kept(X), rtol=1e-4, atol=1e-4)


def test_folded_weights_never_lie_side_by_side() -> None:
    """Folding all before packing any held a third copy of ResNet-50's weights, 98 MiB, at the peak."""
    alive: list[StorageWeakRef] = []
    most = 0

    def prepack(weight: torch.Tensor) -> torch.Tensor:
        nonlocal most
        alive.append(StorageWeakRef(weight.untyped_storage()))
        most = max(most, sum(not storage.expired() for storage in alive))
        return weight.clone()

    graph = Graph()
    source = graph.placeholder("weight")
    graph.output(tuple(graph.call_function(torch.neg, (source,)) for _ in range(4)))
    weight = randn(8, 8, 3, 3)
    packed = pack(GraphModule({}, graph), [prepack] * 4, [weight])
    assert all(torch.equal(one, -weight) for one in packed)
    assert most == 1


def test_two_threads_may_call_at_once() -> None:
    torch._dynamo.reset()
    model = network()
    fast = convselect.compile(model, calibrate="never")
    inputs = [randn(2, 8, 12, 12, seed=seed) for seed in range(8)]
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
        fast(inputs[0])
    failures = []

    def work(start: int) -> None:
        with torch.inference_mode():
            for i in range(40):
                j = (start + i) % len(inputs)
                if not torch.allclose(fast(inputs[j]), expected[j], rtol=1e-4, atol=1e-4):
                    failures.append(j)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@torch.inference_mode()
def test_memory_that_a_storage_has_given_back_is_not_read() -> None:
    """Its blocks are so large that reading them then ends the process."""
    with torch.inference_mode(False):
        model = nn.Conv2d(1024, 1024, 3).eval()
    x = randn(1, 1024, 4, 4)
    fast = convselect.compile(model, calibrate="never", strict=True)
    want = fast(x)
    model.weight.untyped_storage().resize_(2 * model.weight.untyped_storage().nbytes())
    torch.testing.assert_close(fast(x), want)
    model.share_memory()
    torch.testing.assert_close(fast(x), want)
