"""The prior for GPUs puts candidates in a sensible order; timing divides, interleaves and abandons as it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clock import Clock
from gpu import FakeDevice, Named, machine

import convselect
from convselect.costs import Costs, model_for, prior, store, tables
from convselect.costs.operators import DEFAULT
from convselect.costs.train import Settings, train
from convselect.measure import calibration, profiling
from convselect.measure import cpu as cpu_timing
from convselect.measure.cuda import GpuTimer
from convselect.measure.timers import timer_on
from convselect.primitive import primitives
from convselect.problem import ConvProblem

EARLY = ConvProblem(mb=32, ic=64, ih=56, iw=56, oc=64, kh=3, kw=3, ph=1, pw=1)
DEEP = ConvProblem(ic=512, ih=7, iw=7, oc=512, kh=3, kw=3, ph=1, pw=1)


def ms(p: ConvProblem, precision: str = "float16") -> dict[str, float]:
    here = machine(precision)
    able = [q for q in primitives("cuda") if q.family != "aten" and q.refusal(p, here) is None]
    row = prior.primitives_ms([p], [(q.name, q.family) for q in able], here)[0]
    return dict(zip([q.name for q in able], row.tolist(), strict=True))


def test_every_prediction_is_a_time() -> None:
    for p in (EARLY, DEEP, replace(EARLY, g=64), replace(EARLY, g=8), replace(EARLY, ic=3), replace(DEEP, kh=1, kw=1)):
        for precision in ("float32", "tf32", "float16", "bfloat16"):
            times = ms(p, precision)
            assert times
            assert all(prior.LAUNCH_MS <= t < 100 for t in times.values())
            more = ms(p.with_batch(4 * p.mb), precision)
            assert all(more[name] >= times[name] for name in times if name in more)


def test_few_pixels_of_many_channels_are_split() -> None:
    times = ms(DEEP)
    assert times["igemm_64x64_split16_nhwc"] < times["igemm_64x64_split4_nhwc"] < times["igemm_64x64_nhwc"]
    assert times["igemm_64x64_nhwc"] < times["igemm_128x256_nhwc"]
    many = ms(EARLY)
    assert many["igemm_64x64_split16_nhwc"] > many["igemm_64x64_nhwc"]


def test_winograd_pays_in_float32_only() -> None:
    p = replace(EARLY, ic=256, oc=256, ih=28, iw=28)
    single, half = ms(p, "float32"), ms(p, "float16")
    assert min(single, key=lambda name: single[name]).startswith("winograd_f4x4")
    assert not min(half, key=lambda name: half[name]).startswith("winograd")


def test_what_torch_does_not_tell_has_defaults() -> None:
    bare = replace(machine(), clock_khz=0, memory_clock_khz=0, memory_bus_bits=0)
    assert prior.primitives_ms([EARLY], [("igemm_64x64_nhwc", "igemm")], bare)[0, 0] > 0
    assert prior.Rates.of(replace(bare, isa="gfx942")).fma > 0


def test_timer() -> None:
    log: list[str] = []
    device = FakeDevice(log)
    timer = GpuTimer(machine("float32"), torch.float32, device)
    p = ConvProblem(ic=8, ih=4, iw=4, oc=8, kh=3, kw=3, ph=1, pw=1)
    found = timer.time_primitives(p, [Named(name, log) for name in ("ab", "abc", 20 * "x")], rounds=4)
    assert found == pytest.approx({"ab": 2.0, "abc": 3.0, 20 * "x": 20.0})
    order = [calls[0] for calls in device.replayed]
    assert {len(calls) for calls in device.replayed} == {timer.calls(p)}
    assert order[:3] == ["ab", "abc", 20 * "x"]
    rest = ["abc", 20 * "x", "ab", "ab", "abc", "ab", "abc"]
    assert order[3:] == rest, "what is slow twice is abandoned, the others take turns"
    assert device.warmed == [["ab"], ["abc"], [20 * "x"]], "with one call, not with all"
    assert device.freed == 1


def test_a_bias_is_as_folding_makes_it() -> None:
    log: list[str] = []
    biases: list[torch.dtype] = []

    class Asked(Named):
        def run(self, problem, activation, src, packed, bias, residual):
            biases.append(bias.dtype)
            assert src.dtype == packed.dtype == torch.float16
            return super().run(problem, activation, src, packed, bias, residual)

    timer = GpuTimer(machine("float16"), torch.float16, FakeDevice(log))
    timer.time_primitives(ConvProblem(ic=8, ih=4, iw=4, oc=8, kh=3, kw=3, ph=1, pw=1), [Asked("a", log)])
    assert set(biases) == {torch.float32}


def test_a_profile_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_GPU_SHAPES", [(1, 8, 4, 4), (2, 8, 4, 4)])
    log: list[str] = []
    point = ConvProblem(ic=8, ih=4, iw=4, oc=8, kh=1, kw=1)
    problems = [replace(point, kh=3, kw=3, ph=1, pw=1), point]
    timer = GpuTimer(machine("float32"), torch.float32, FakeDevice(log))
    named = [Named(name, log) for name in ("ab", "abc")]
    out = tmp_path / "gpu.parquet"
    assert profiling.profile(out, problems, named, timer=timer, progress=False).timings == 4
    assert profiling.profile(out, problems, named, timer=timer, progress=False).skipped == 2
    table = tables.read([out])
    assert table.machines == (str(timer.machine),) * 2
    assert table.ms == pytest.approx(np.array([[2.0, 3.0]] * 2))
    rows = tables.read_operators([profiling.operators_path(out)])
    assert sorted({(key, nbytes) for key, nbytes, *_ in rows}) == [
        (key, n * 2 * 4 * 128) for key in ("to_nchw", "to_nhwc") for n in (1, 2)
    ]


def test_what_a_timer_leaves_out_is_timed_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_GPU_SHAPES", [])
    log: list[str] = []
    problems, named = [DEEP], [Named(name, log) for name in ("ab", "abc")]
    timer, out = GpuTimer(machine("float32"), torch.float32, FakeDevice(log)), tmp_path / "gpu.parquet"
    whole = timer.record
    monkeypatch.setattr(timer, "record", lambda p, q, *rest: None if q.name == "ab" else whole(p, q, *rest))
    assert profiling.profile(out, problems, named, timer=timer, progress=False).timings == 1
    monkeypatch.setattr(timer, "record", whole)
    assert profiling.profile(out, problems, named, timer=timer, progress=False).timings == 1
    assert tables.read([out]).timings == 2


def test_operators_that_were_not_timed_are_the_rooflines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights know the changes of layout only; without the rest a pooling would cost 100 times too much."""
    here, operators = machine("float32"), tmp_path / "operators.parquet"
    rows = [{"key": "to_nhwc", "bytes": n, "threads": 1, "ms": n / 1e9} for n in (10**6, 10**7)]
    pq.write_table(pa.Table.from_pylist(rows), operators)
    problems = [replace(EARLY, ic=ic) for ic in (16, 32, 64, 128)]
    table = pa.Table.from_pylist(
        [{**vars(p), "primitive": name, "ms": t} for p in problems for name, t in ms(p, "float32").items()]
    )
    monkeypatch.setattr("convselect.costs.prior.shipped", lambda machine: tmp_path / "gpu.safetensors")
    prior = model_for(here)
    train([table], operators=[operators], out=tmp_path / "gpu.safetensors", settings=Settings(steps=2), progress=False)
    model = model_for(here)
    assert model.primitives
    assert model.operators.ms("to_nhwc", 5e6, 1) == pytest.approx(5e-3)
    for key in ("to_nchw", "max_pool:3x3s2x2.nhwc", "add.nchw"):
        assert model.operators.line(key, 1) == prior.operators.line(key, 1) != DEFAULT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_to_time() -> None:
    with pytest.raises(ValueError, match="no GPU"):
        timer_on("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_to_calibrate() -> None:
    with pytest.raises(ValueError, match="no GPU"):
        convselect.calibrate(device="cuda")


def test_calibration_corrects_the_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which every call takes as many ms as its name has letters, far from what the prior says."""
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path))
    Clock.of(monkeypatch, calibration, cpu_timing, look_s=1e-3)
    log: list[str] = []
    problems = [ConvProblem(ic=64, ih=size, iw=size, oc=64, kh=3, kw=3, ph=1, pw=1) for size in (14, 28, 56)]
    named = [Named(name, log) for name in ("igemm_64x64", "igemm_128x128_nhwc", "winograd_f2x2_3x3_64x64_nhwc")]
    timer = GpuTimer(machine("float32"), torch.float32, FakeDevice(log))
    before = Costs(model_for(timer.machine), None, timer.machine)
    candidates = [(q.name, q.name.split("_")[0]) for q in named]
    assert (before.predict(problems, candidates)[1] > 0.5).all()
    samples = calibration.calibrate(
        2.0, problems=problems[:2], able=dict.fromkeys(problems, named), timer=timer, progress=False
    )
    assert samples.timings
    assert {key for key, *_ in samples.operators} == {"to_nchw", "to_nhwc"}
    assert store.load(timer.machine) == samples
    assert store.load(machine("float16")) is None
    after = before.with_samples(samples)
    letters = np.array([[len(q.name) for q in named]] * 3)
    (ms, std), (after_ms, after_std) = (costs.predict(problems, candidates) for costs in (before, after))
    errors = [np.abs(np.log(times / letters)) for times in (ms, after_ms)]
    assert errors[1].max() < 0.5 < errors[0].min()
    assert (after_std < std).all()


def test_calls_cover_the_l2() -> None:
    timer = GpuTimer(machine("float16"), torch.float16, FakeDevice([]))
    assert timer.calls(ConvProblem(ic=8, ih=4, iw=4, oc=8, kh=1, kw=1)) == 32
    assert timer.calls(ConvProblem(mb=64, ic=256, ih=56, iw=56, oc=256, kh=1, kw=1)) == 4
    p = ConvProblem(ic=512, ih=14, iw=14, oc=1024, kh=3, kw=3)
    assert 0 <= timer.calls(p) * (p.weight_bytes + p.dst_bytes) // 2 - 2 * 50 * 2**20 < p.weight_bytes
