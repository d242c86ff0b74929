"""Machines with no GPU, no Triton or another vendor's GPU: nothing breaks, and refusals say why."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import DEVICE, TRITON, machine

import convselect
from convselect import machine as machines
from convselect.machine import PRECISIONS, Gpu
from convselect.primitive import candidates
from convselect.primitives.gpu import base
from convselect.problem import ConvProblem

ROOT = Path(__file__).resolve().parent.parent
P = ConvProblem(ic=64, ih=14, iw=14, oc=64, kh=3, kw=3, ph=1, pw=1)
AMD = replace(machine(), name="AMD Instinct MI300X", isa="gfx942")


def reasons(here: machines.Machine) -> dict[str, str | None]:
    return {primitive.name: primitive.refusal(P, here) for primitive in convselect.primitives(device="cuda")}


def test_the_registry_is_there_without_a_gpu() -> None:
    found = convselect.primitives(device="cuda")
    assert len(found) >= 14
    assert {"igemm", "pointwise", "depthwise", "stem", "grouped", "winograd", "im2row", "cudnn", "aten"} == {
        primitive.family for primitive in found
    }
    assert not {p.name for p in found} & {p.name for p in convselect.primitives(device="cpu")}


def test_without_a_gpu_all_refuse() -> None:
    assert all("GPU" in str(reason) for reason in reasons(machines.cpu()).values())


def test_another_vendors_gpu_runs_aten() -> None:
    found, refusals = candidates(P, AMD, "default")
    assert {primitive.family for primitive in found} == {"aten"}
    assert len(refusals) >= 14
    assert all("NVIDIA" in reason and AMD.name in reason for reason in refusals.values())


def test_without_triton_cudnn_is_left() -> None:
    found, refusals = candidates(P, machine(triton=""), "default")
    assert {primitive.family for primitive in found} == {"cudnn"}
    assert all("Triton" in reason for reason in refusals.values())


def test_triton_that_cannot_build_is_asked_once_and_only_for_a_gpu_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    asked = []

    def works(device: torch.device) -> bool:
        asked.append(device)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr("convselect.kernels.triton.probe.works", works)
    base._no_launch.cache_clear()
    try:
        assert "igemm" in {primitive.family for primitive in candidates(P, machine(), "default")[0]}
        assert not asked
        found, refusals = candidates(P, replace(machine(), index=0), "default")
    finally:
        base._no_launch.cache_clear()
    assert {primitive.family for primitive in found} == {"cudnn"}
    assert refusals["igemm_64x64_nhwc"] == (
        "it needs Triton, which fails on cuda:0 (RuntimeError: Failed to find C compiler.)"
    )
    assert asked == [torch.device("cuda", 0)]


def test_the_kernel_that_shows_whether_triton_works() -> None:
    pytest.importorskip("triton")
    from convselect.kernels.triton.probe import works

    assert works(DEVICE)


def test_an_older_gpu() -> None:
    found, refusals = candidates(P, machine(capability=75), "default")
    assert {primitive.family for primitive in found} == {"cudnn"}
    assert refusals["igemm_64x64_nhwc"] == (
        "it needs compute capability 8.0 or later, and a GPU of capability 75 has 7.5"
    )


def test_a_gpu_of_little_shared_memory() -> None:
    found = reasons(machine("float16", capability=89))
    assert found["igemm_64x64_nhwc"] is None
    assert "shared memory" in str(found["igemm_128x256_nhwc"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str) -> None:
    found, refusals = candidates(P, machine(precision), "default")
    names = {primitive.name for primitive in found}
    half = precision in ("float16", "bfloat16")
    assert ("winograd_f4x4_3x3_64x64_nhwc" in names) != half
    assert ("igemm_128x256_nhwc" in names) == half
    assert "winograd_f2x2_3x3_64x64_nhwc" in names
    assert ("winograd_f2x2_3x3_64x64_nhwc" in refusals) is False


@pytest.mark.parametrize("precision", PRECISIONS)
def test_strict_is_direct_and_gemm_based(precision: str) -> None:
    """cuDNN's algorithm is its own secret."""
    found, refusals = candidates(P, machine(precision), "strict")
    families = {primitive.family for primitive in found}
    assert "igemm" in families
    assert not families & {"winograd", "cudnn", "aten"}
    assert refusals["cudnn_nhwc"] == 'its accuracy class is "default", and "strict" was asked for'


def test_memory_is_told_without_triton() -> None:
    for primitive in TRITON:
        for problem in (P, replace(P, g=64), replace(P, g=8), replace(P, ic=3), replace(P, kh=1, kw=1, ph=0, pw=0)):
            if primitive.refusal(problem, machine(primitive.precisions[0])) is None:
                for precision in primitive.precisions:
                    assert primitive.packed_bytes(problem, machine(precision)) > 0
                    assert primitive.workspace_bytes(problem, machine(precision)) >= 0


def test_too_large_workspaces_are_refused() -> None:
    large = ConvProblem(mb=256, ic=256, ih=112, iw=112, oc=256, kh=3, kw=3, ph=1, pw=1)
    for name in ("winograd_f2x2_3x3_64x64_nhwc", "im2row_128x64_nhwc", "igemm_64x64_split16_nhwc"):
        primitive = next(primitive for primitive in TRITON if primitive.name == name)
        assert "GiB" in str(primitive.refusal(large, machine()))


def test_importing_imports_neither_triton_of_ours_nor_inductor() -> None:
    """torch._dynamo imports Triton where it is installed; where it is not, or is broken, nothing of ours may need it.
    Inductor takes a second, and only `remainder="inductor"` needs it.
    """
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, torch._dynamo.backends.common\n"
        "inductor = 'torch._inductor.compile_fx' in sys.modules\n"
        "import convselect, convselect.cli\n"
        "from convselect import machine\n"
        "found = convselect.primitives(device='cuda')\n"
        "assert len(found) >= 14 and not torch.cuda.is_initialized()\n"
        "assert inductor or 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert not [m for m in sys.modules if m.startswith('convselect.kernels.triton.') and not m.endswith('launch')]"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_triton_is_imported_in_functions_only() -> None:
    for path in (ROOT / "convselect").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                fine = name == "convselect.kernels.triton.launch" or "triton" not in name.split(".")
                assert fine, f"{path.relative_to(ROOT)} imports {name}"


def properties(**more: object) -> SimpleNamespace:
    return SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=150 * 10**9,
        L2_cache_size=50 * 2**20,
        shared_memory_per_block_optin=232448,
        **more,
    )


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch believes in an H200; older versions of torch do not tell the clocks."""
    found = properties()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr("convselect.machine._driver_version", lambda: 13000)
    monkeypatch.setattr(torch.version, "hip", None)
    return found


def test_machine(h200: SimpleNamespace) -> None:
    here = machines.gpu(0, torch.float16)
    assert (here.device, here.name, here.isa, here.capability) == ("cuda", "NVIDIA H200", "sm_90", 90)
    assert (here.cores, here.l1d_bytes, here.l2_bytes, here.memory_bytes) == (132, 232448, 50 * 2**20, 150 * 10**9)
    assert (here.clock_khz, here.driver, here.precision) == (0, 13000, "float16")
    h200.clock_rate = 1980000
    assert machines.gpu(0, torch.float16).clock_khz == 1980000


def test_fingerprints_differ(h200: SimpleNamespace) -> None:
    """By precision, driver and the version of Triton; not by when one asks, or by which of several alike."""
    here = machines.gpu(0, torch.float16)
    assert here.fingerprint == machines.gpu(0, torch.float16).fingerprint
    assert (here.index, machines.gpu(1, torch.float16).index) == (0, 1)
    assert here.fingerprint == machines.gpu(1, torch.float16).fingerprint
    others = [
        machines.gpu(0, torch.bfloat16),
        replace(here, driver=13010),
        replace(here, triton="0"),
        replace(here, driver_release="1.2"),
    ]
    assert len({here.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("text", "release"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57  Release Build  (root@here)", "575.57"),
        ("", ""),
    ],
)
def test_release_of_the_driver(text: str, release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert machines._driver_release() == release


def test_triton_of_any_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    version = machines._triton_version.__wrapped__
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", {"triton-windows": "3.5.0"}.__getitem__)
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"triton": ["triton-windows"]})
    assert version() == "3.5.0"
    monkeypatch.setattr("importlib.metadata.packages_distributions", dict)
    assert version() == "unknown"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert version() == ""


def test_tf32_only_where_torch_allows_it(h200: SimpleNamespace) -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert machines.gpu().precision == "tf32"
        h200.major = 7
        assert machines.gpu().precision == "float32"
        h200.major = 9
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert machines.gpu().precision == "float32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_amd(h200: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    h200.name, h200.gcnArchName = "AMD Instinct MI300X", "gfx942:sramecc+:xnack-"
    here = machines.gpu()
    assert isinstance(here, Gpu)
    assert (here.isa, here.capability, here.precision) == ("gfx942", 0, "float32")
