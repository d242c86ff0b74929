"""The builds for other instruction sets than this machine's best: kernels, programs and operators, a part of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convselect.machine import cpu

SETS = ("avx512", "avx2", "portable")
FILES = ("test_primitives", "test_winograd", "test_depthwise", "test_operators", "test_program")


@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS[1:])
def test_another_instruction_set(isa: str) -> None:
    here = cpu().isa
    if here not in SETS[: SETS.index(isa)]:
        pytest.skip(f"this machine has {here}")
    folder = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            "--one-in",
            "8",
            *(folder / f"{name}.py" for name in FILES),
        ],
        env={**os.environ, "CONVSELECT_ISA": isa},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
