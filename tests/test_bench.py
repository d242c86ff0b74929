"""The benchmark: its protocol, its report, and a run small enough for a test."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from clock import Clock
from torch import nn

from convselect.bench import markdown, runner
from convselect.bench.networks import convolution_flops, from_factory, load, parse_shape, randomise
from convselect.bench.peers import PEERS, Call, Peer, exported
from convselect.bench.plot import plot
from convselect.bench.report import Report, Row, geomean, page
from convselect.bench.runner import Protocol, Result, block_ms, compare, interleave, rel_l2
from convselect.cli import main

QUICK = Protocol(rounds=2, runs=1, settle_ms=0)


def tiny() -> nn.Module:
    """What `MODULE:FACTORY` may name."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))


X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def broken(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
    raise RuntimeError("cannot take it\nand a long trace")


def wrong(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
    return lambda: torch.full((1, 4), float("nan"))


def test_compare_times_checks_and_reports_absence() -> None:
    peers = [
        PEERS["eager"],
        PEERS["eager_nhwc"],
        Peer("gone", "Gone", broken, ("no_such_package",)),
        Peer("broken", "Broken", broken),
        Peer("wrong", "Wrong", wrong),
    ]
    model = tiny().eval()
    results = {result.peer: result for result in compare(model, X, peers, QUICK)}
    assert list(results) == [peer.name for peer in peers]
    for name in ("eager", "eager_nhwc"):
        result = results[name]
        assert result.rel_l2 is not None
        assert result.rel_l2 < 1e-6
        assert result.median_ms is not None
        assert result.min_ms is not None
        assert 0 < result.min_ms <= result.median_ms
    assert results["gone"].absent == "Gone is not installed here: `pip install no_such_package`"
    assert results["broken"].absent == "Broken failed: cannot take it"
    assert results["wrong"].rel_l2 == math.inf


def test_what_convselect_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="cannot take it"):
        compare(tiny().eval(), X, [Peer("convselect", "convselect", broken)], QUICK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By events, in the type that is asked for; a runtime for CPUs says so. "meta" stands for the GPU."""
    seen: list[torch.dtype] = []

    class Interval:
        def __enter__(self) -> Interval:
            return self

        def __exit__(self, *raised: object) -> None: ...

        def ms(self) -> float:
            return 3.0

    def prepare(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
        seen.extend([x.dtype, *(parameter.dtype for parameter in model.parameters())])
        return lambda: torch.zeros(1, 4)

    monkeypatch.setattr(runner.streams, "Interval", Interval)
    monkeypatch.setattr(runner.streams, "finish", lambda device: None)
    monkeypatch.setattr(runner, "reference", lambda model, x: torch.ones(1, 4))
    peers = [Peer("taken", "Taken", prepare, on_gpus=True), PEERS["openvino"]]
    taken, openvino = compare(tiny().eval(), X, peers, QUICK, device=torch.device("meta"), dtype=dtype)
    assert (taken.median_ms, taken.min_ms, taken.rel_l2) == (3.0, 3.0, 1.0)
    assert set(seen) == {dtype}
    assert openvino.absent == "OpenVINO f32 is timed on CPUs only"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    done = CliRunner().invoke(main, ["bench", "resnet18", "--device", "cuda"])
    assert done.exit_code
    assert "no GPU" in done.output


def test_rounds_are_shuffled_and_blocks_stay_together() -> None:
    order: list[str] = []

    def call(name: str) -> Call:
        return lambda: order.append(name) or torch.empty(0)  # type: ignore

    times = interleave({name: call(name) for name in "abc"}, Protocol(rounds=8, runs=1, settle_ms=0))
    rounds = ["".join(order[start : start + 6]) for start in range(0, 48, 6)]
    assert all(sorted(one[::2]) == list("abc") and one[::2] == one[1::2] for one in rounds)
    assert len(set(rounds)) > 2
    assert all(len(blocks) == 8 for blocks in times.values())


@pytest.mark.parametrize(("name", "least"), [("rounds", 1), ("runs", 1), ("settle_ms", 0)])
def test_protocol_has_runs(name: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {least - 1}, must be at least {least}"):
        Protocol(**{name: least - 1})


def test_runs_before_the_system_has_settled_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds = Clock.of(monkeypatch, runner), iter([0.02, 0.02, 0.001, 0.003, 0.002])
    found = block_ms(lambda: clock.sleep(next(seconds)) or X, Protocol(runs=3, settle_ms=30))  # type: ignore
    assert found == pytest.approx(2)


@pytest.mark.parametrize(
    ("budget_s", "expected"), [(None, (15, 5)), (60, (15, 5)), (40, (12, 5)), (10, (5, 2)), (0, (5, 1))]
)
def test_slow_networks_get_fewer_rounds_and_then_fewer_runs(budget_s: float | None, expected: tuple[int, int]) -> None:
    shorter = Protocol(budget_s=budget_s).within_budget([100.0, 400.0])  # a round takes 0.2 + 0.5 (1 + runs) seconds
    assert (shorter.rounds, shorter.runs) == expected


def test_exported_files_are_made_once_for_the_same_weights_and_sizes(tmp_path: Path) -> None:
    made = []

    def export(model: nn.Module, x: torch.Tensor) -> Path:
        return exported("kind", model, x, tmp_path, lambda folder: made.append(folder) or (folder / "file").touch())  # type: ignore

    model = tiny().eval()
    path = export(model, X)
    assert (path / "file").exists()
    assert export(tiny().eval(), X) == path
    assert len(made) == 1
    assert export(model, X[:, :, :4]) != path
    with torch.no_grad():
        model[0].bias.add_(1)
    assert export(model, X) != path
    assert len(made) == 3


@pytest.mark.skipif(find_spec("ncnn") is None or find_spec("pnnx") is None, reason="ncnn is a peer only")
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_ncnn_takes_a_batch(batch: int) -> None:
    model, x = tiny().eval(), torch.randn(batch, 3, 8, 8)
    (result,) = compare(model, x, [PEERS["ncnn"]], QUICK)
    assert result.rel_l2 is not None
    assert result.rel_l2 < 1e-5


def test_convolution_flops() -> None:
    assert convolution_flops(tiny(), X) == 2 * 8 * 3 * 9 * 64


def test_rel_l2() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert rel_l2(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert rel_l2(torch.tensor([3.0, math.nan]), exact) == math.inf
    assert rel_l2(torch.tensor([3.0]), exact) == math.inf


def test_random_weights_are_sane_and_batch_norms_not_trivial() -> None:
    models = [tiny(), tiny()]
    for model in models:
        randomise(model, torch.randn(2, 3, 8, 8), torch.Generator().manual_seed(1))
    norm = models[0][1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert not models[0].training
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(norm, name).std() > 1e-3
    first = [p for model in models[:1] for p in model.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(first, models[1].parameters(), strict=True))
    assert 0.1 < models[0](X).std() < 10


def report() -> Report:
    results = [
        [("eager", 20.0), ("onnxruntime", 10.0), ("openvino", None), ("convselect", 5.0)],
        [("eager", 40.0), ("onnxruntime", None), ("openvino", 8.0), ("convselect", 10.0)],
    ]
    rows = [
        Row(
            f"net{i}",
            (1, 3, 8, 8),
            [Result(p, ms, ms, 1e-6, 1.0, None if ms else f"{p} failed", 2 - i, 1) for p, ms in row],
            10**9,
        )
        for i, row in enumerate(results)
    ]
    labels = {name: name for name, _ in results[0]}
    return Report(
        "a machine",
        "0" * 16,
        2,
        1,
        "convselect bench net0 net1",
        QUICK,
        labels,
        "today",
        {"torch": "2"},
        0.0,
        rows,
        {"a product": 80.0, "another": 100.0},
    )


def test_report_ratios() -> None:
    assert report().ratio(None) == pytest.approx(math.sqrt(2 * 0.8))
    assert report().ratio("eager") == pytest.approx(4)
    assert report().ratio("onnxruntime") == pytest.approx(2)
    assert geomean([2, 8]) == pytest.approx(4)


def test_markdown_table() -> None:
    lines = markdown.table(["name", "ms", "why"], [("a", 1.5, None), ["b", None, "slow"]], left=(0, 2))
    assert lines == ["| name | ms | why |", "| --- | ---: | --- |", "| a | 1.5 |  |", "| b |  | slow |"]
    assert markdown.table(["name", "ms"], []) == ["| name | ms |", "| --- | ---: |"]


def test_report_round_trip_and_page(tmp_path: Path) -> None:
    assert Report.from_json(report().to_json()) == report()
    text = page([report(), replace(report(), batch=8, threads=1)], "plot.png")
    for line in (
        "## Batch 1, 2 threads",
        "## Batch 8, 1 thread",
        "| net0 | 20.00 | 10.00 |  | **5.00** | 2.00 | 200% |",
        "| net1 | 40.00 |  | **8.00** | 10.00 | 0.80 | 100% |",
        "- float32 peak, the best of (GFLOP/s): a product 80, another 100",
        "- command: `convselect bench net0 net1`",
        "- net1: 1 rounds of 1 timed runs",
        "- openvino failed",
    ):
        assert line in text.splitlines(), line
    pytest.importorskip("matplotlib")
    plot([report(), report()], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command_against_eager_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "tiny_net.py").write_text("from torch import nn\ndef make():\n    return nn.Conv2d(3, 4, 3)\n")
    monkeypatch.syspath_prepend(str(folder))
    arguments = ["--model", "tiny_net:make", "--input", "2x3x8x8", "--against", "eager", "--without-convselect"]
    paths = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(main, ["bench", *arguments, "--rounds", "1", "--threads", "1", *paths])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["threads"] == 1
    assert data["rows"][0]["shape"] == [2, 3, 8, 8]
    assert data["rows"][0]["results"][0]["median_ms"] > 0
    assert "| tiny_net:make |" in (tmp_path / "out.md").read_text()


def test_shapes() -> None:
    assert parse_shape("1x3x224x224") == (1, 3, 224, 224)
    for text in ("", "3", "1x", "1x0", "1X3", "-1x3"):
        with pytest.raises(ValueError, match="must be sizes joined by 'x'"):
            parse_shape(text)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tests", "must read MODULE:FACTORY"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("math:make", "math has no callable named 'make'"),
        ("builtins:list", "returned list, must return a torch.nn.Module"),
    ],
)
def test_factories_that_are_none(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_factory(target)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="the networks are torchvision's")
def test_unknown_network_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        load("resnet_18")
