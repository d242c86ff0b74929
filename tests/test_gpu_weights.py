"""Weights on a GPU: packed again where they were, and compared without waiting more than once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph, GraphModule

from convselect.runtime import weights
from convselect.runtime.weights import Constants


def test_weights_are_packed_again_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where captures know their addresses; also where the modes of the two calls differ."""

    log = pretend_streams(monkeypatch)
    graph = Graph()
    source = graph.placeholder("weight")
    graph.output((graph.call_function(torch.neg, (source,)), source))
    constants = Constants(GraphModule({}, graph), [lambda weight: weight.flatten().clone(), None], torch.device("cuda"))
    weight = torch.randn(3, 4)
    with torch.inference_mode():
        first = constants.current([weight])
    addresses = [tensor.data_ptr() for tensor in first]
    weight.mul_(2)
    again = constants.current([weight])
    assert again is first
    assert [tensor.data_ptr() for tensor in again] == addresses
    assert torch.equal(again[0], -weight.flatten())
    assert torch.equal(again[1], weight)
    assert constants.current([weight]) is first
    assert log == ["record", "wait", "finish", "record", "wait", "wait"]
    weight.mul_(2)
    monkeypatch.setattr(weights.streams, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the model once before it is captured"):
        constants.current([weight])


def pretend_streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of them, in order, while packing."""
    log: list[str] = []
    ready = SimpleNamespace(wait=lambda: log.append("wait"), record=lambda: log.append("record"))
    pretended = SimpleNamespace(
        Ready=lambda device: ready, finish=lambda device: log.append("finish"), is_capturing=lambda: False
    )
    monkeypatch.setattr(weights, "streams", pretended)
    return log


def test_packing_on_a_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It overwrites what an earlier call has packed, which must not pass for whole when the old weights come back."""
    pretend_streams(monkeypatch)
    graph = Graph()
    source = graph.placeholder("weight")
    graph.output((graph.call_function(torch.neg, (source,)), graph.call_function(torch.abs, (source,))))
    fails = list[int]()

    def prepack(weight: torch.Tensor) -> torch.Tensor:
        if fails:
            raise LookupError("no luck")
        return weight.clone()

    constants = Constants(GraphModule({}, graph), [None, prepack], torch.device("cuda"))
    old, new = torch.randn(3, 4), torch.randn(3, 4)
    addresses = [tensor.data_ptr() for tensor in constants.current([old])]
    fails.append(1)
    with pytest.raises(LookupError):
        constants.current([new])
    fails.clear()
    again = constants.current([old])
    assert torch.equal(again[0], -old)
    assert torch.equal(again[1], old.abs())
    assert [tensor.data_ptr() for tensor in again] == addresses, "where CUDA graphs have captured them"


def test_weights_without_versions_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the host waits each time; and not while the caller captures, where it must not."""
    pretend_streams(monkeypatch)
    monkeypatch.setattr(weights, "_only_data_tells", torch.is_inference)
    monkeypatch.setattr(torch.ops.convselect, "fingerprint", lambda ranges: 0)
    compared, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: bool(compared.append(a.numel())) or equal(a, b))
    graph = Graph()
    graph.output(tuple(graph.placeholder(name) for name in "abc"))
    constants = Constants(GraphModule({}, graph), [None] * 3, torch.device("cuda"))
    with torch.inference_mode():
        statics = [torch.randn(3, 4), torch.randn(5).half(), torch.randn(2, 3, 2, 2)]
        constants.current(statics)
        constants.current(statics)
        assert compared == [12 + 5 + 24]
        statics[1][4] += 1
        assert torch.equal(constants.current(statics)[1], statics[1])
        statics[2][1, 2, 1, 1] += 1
        monkeypatch.setattr(weights.streams, "is_capturing", lambda: True)
        compared.clear()
        constants.current(statics)
        assert not compared
