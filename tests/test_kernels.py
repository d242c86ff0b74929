"""The kernels without torch: on an emulated aarch64 processor, under sanitizers, and as they are shipped.

`tests/kernels` holds the program. It is told what to run, so that what a primitive takes is said once, in
`convselect/primitives`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from problems import CORNERS, MACHINE, RANDOM, REAL

from convselect.primitive import primitives
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
ISAS = ("neon",) if MACHINE.isa == "neon" else ("avx512", "avx2", "portable")
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1"}


def build(folder: str, *options: str, source: Path = ROOT / "tests" / "kernels") -> Path:
    """What is built of `source` in a folder of build/, which is kept for the next time."""
    built = ROOT / "build" / folder
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (["cmake", "-G", "Ninja", "-S", source, "-B", built, *options], ["cmake", "--build", built]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return built


def built_with_the_package() -> Path | str:
    """The library of kernels that an editable install has left in build/, "" if there is none of today's sources."""
    archives = list(ROOT.glob("build/*/kernels/cpu/libconvselect_kernels.a"))
    sources = [path.stat().st_mtime for path in (ROOT / "kernels" / "cpu").glob("*.[ch]*")]
    return next((path for path in archives if path.stat().st_mtime > max(sources)), "")


def lines(problems: list[ConvProblem], isa: str) -> str:
    """What the program reads: a line for each problem and kernel that takes it."""
    machine = replace(MACHINE, isa=isa)
    kernels = [primitive for primitive in primitives() if isinstance(primitive, KernelPrimitive)]
    return "".join(
        f"{kernel.name} {kernel.error_bound} {p.mb} {p.ic} {p.ih} {p.iw} {p.oc} {p.kh} {p.kw} "
        f"{p.sh} {p.sw} {p.ph} {p.pw} {p.dh} {p.dw} {p.g}\n"
        for p in problems
        for kernel in kernels
        if kernel.refusal(p, machine) is None
    )


def check(command: list[str | Path], problems: list[ConvProblem], isa: str, **environment: str) -> None:
    done = subprocess.run(
        command,
        input=lines(problems, isa),
        env={**os.environ, **environment, "CONVSELECT_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    found, *counts = done.stdout.splitlines() or [""]
    if found != isa and found in ISAS:
        pytest.skip(f"the processor has no {isa}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for line in counts:
        name, count, _ = line.split()
        assert int(count) >= 3, f"{name} ran on {count} problems only"


def small(problems: list[ConvProblem], macs: int) -> list[ConvProblem]:
    return [p for p in problems if p.flops <= 2 * macs]


@pytest.mark.slow
@pytest.mark.skipif(MACHINE.isa == "neon", reason="is the processor at hand")
def test_aarch64() -> None:
    missing = [tool for tool in (CROSS, EMULATOR) if shutil.which(tool) is None]
    if missing:
        reason = f"{' and '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user"
        if os.environ.get("CI") and not os.environ.get("CONVSELECT_NO_AARCH64"):
            pytest.fail(reason)
        pytest.skip(reason)
    program = build(
        "kernel_test/aarch64",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    check([EMULATOR, program / "kernel_test"], small(CORNERS + RANDOM[:500], 500_000), "neon")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=[] if isa == MACHINE.isa else pytest.mark.slow) for isa in ISAS]
)
def test_as_shipped(isa: str, every: bool) -> None:
    """The corners, and all others or a part of them; `test_primitives.py` runs more on the instruction set at hand."""
    others = (RANDOM + REAL)[:: 1 if every else 6]
    program = build("kernel_test/native", f"-DCONVSELECT_KERNELS={built_with_the_package()}")
    check([program / "kernel_test"], small(CORNERS + others, 2_000_000), isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_under_sanitizers(isa: str) -> None:
    """In the folder of `make sanitize`, which runs Python's tests with the library that is built beside."""
    folder = build("kernel_test/sanitized", "-DCONVSELECT_SANITIZE=ON", source=ROOT) / "tests" / "kernels"
    check([folder / "kernel_test"], small(CORNERS + RANDOM[:100], 300_000), isa, **SANITIZER_OPTIONS)


def test_an_unknown_instruction_set_is_told_those_of_this_build() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import convselect.kernels; convselect.kernels.isa()"],
        env={**os.environ, "CONVSELECT_ISA": "sse"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert f"CONVSELECT_ISA is 'sse', must be one of {', '.join(ISAS)}\n" in done.stderr
